"""What RL compares the policy with and judges it by, and how all of these models lie over the trainer's ranks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from rlhf.assembly.matter import Matter
from rlhf.assembly.site import Site
from rlhf.config import ModelRewardConfig
from rlhf.config.algo import AlgoConfig
from rlhf.config.trainer import ShardedConfig
from rlhf.learning.by_layer import ByLayer
from rlhf.learning.pass_choice import choose_passes
from rlhf.learning.spread import Sharded, Whole
from rlhf.models.adapter import has_adapter
from rlhf.models.value import Head, value_model
from transfer.agreement.dtensor import full, is_dtensor, local_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lay_out(site: Site, matter: Matter) -> None:
    """Make reference and critic of the policy as it is now, and let all lie over the ranks as they will be trained."""
    policy, algo = matter.policy, site.config.algo
    matter.passes = choose_passes(policy, site.config.model, site.bars.say, matter.padded)
    matter.spread = _spread(site, policy)
    if matter.spread.lockstep:
        matter.passes = matter.passes.in_lockstep()
    if isinstance(algo, AlgoConfig):
        matter.reference = _reference(policy) if algo.kl_coef > 0 else None
        matter.critic = value_model(policy, Head.token) if algo.has_critic else None
    if site.ranks.first or site.saved is None:  # trained by all ranks, and then asked by the first
        for name, part in site.config.reward.weighted().items():
            if isinstance(part.reward, ModelRewardConfig) and part.reward.path is None:
                matter.untrained[name] = value_model(policy, Head.sequence)
    for model in {id(each): each for each in (policy, matter.reference, matter.critic) if each is not None}.values():
        matter.spread.lay(model)


def will_be_sharded(site: Site) -> bool:
    """Whether no rank is to hold all of what it trains."""
    return site.ranks.count > 1 and isinstance(site.config.trainer, ShardedConfig)


@torch.no_grad()
def follow(matter: Matter, dtype: torch.dtype) -> None:
    """Let a sharded policy be one in `dtype`, though its shards are fp32, and all copies of it what it is now."""
    policy = matter.policy
    for parameter in policy.parameters():
        mine = local_part(parameter)
        mine.copy_(mine.to(dtype))
    _overwrite(matter.reference, policy)
    for model in (matter.critic, *matter.untrained.values()):
        _overwrite(model and model.base_model, policy.base_model)


def _overwrite(copied: torch.nn.Module | None, policy: torch.nn.Module) -> None:
    """Shards by shards, and a model that is whole by all shards of a tensor, one after the other."""
    if copied is None:
        return
    now: dict[str, Any] = policy.state_dict(keep_vars=True)
    for name, mine in copied.state_dict(keep_vars=True).items():
        theirs = now[name]
        mine.copy_(theirs if is_dtensor(mine) else full(theirs))


def _spread(site: Site, policy: PreTrainedModel) -> Whole:
    trainer = site.config.trainer
    if not (isinstance(trainer, ShardedConfig) and will_be_sharded(site)):
        return Whole(site.ranks)
    if trainer.by_layer:
        return ByLayer(site.ranks, policy.device, trainer.reshard is not False, trainer.offload)
    return Sharded(site.ranks, policy.device, trainer.offload)


def _reference(policy: PreTrainedModel) -> PreTrainedModel:
    """A copy of the policy as it is, or the policy itself, which without its adapter is what it was."""
    return policy if has_adapter(policy) else copy.deepcopy(policy).requires_grad_(False)
