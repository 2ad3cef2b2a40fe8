"""What RL compares the policy with and judges it by, and how all of these models lie over the trainer's ranks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from rlhf.assembly.matter import Matter
from rlhf.assembly.site import Site
from rlhf.config import ModelRewardConfig
from rlhf.config.algo import AlgoConfig
from rlhf.config.trainer import ShardedConfig
from rlhf.learning.pass_choice import choose_passes
from rlhf.learning.spread import Sharded, Whole
from rlhf.models.adapter import has_adapter
from rlhf.models.value import Head, value_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lay_out(site: Site, matter: Matter) -> None:
    """Make reference and critic of the policy as it is now, and let all lie over the ranks as they will be trained."""
    policy, algo = matter.policy, site.config.algo
    matter.passes = choose_passes(policy, site.config.model, site.bars.say, matter.padded)
    matter.spread = _spread(site, policy)
    if isinstance(algo, AlgoConfig):
        matter.reference = _reference(policy) if algo.kl_coef > 0 else None
        matter.critic = value_model(policy, Head.token) if algo.has_critic else None
    if site.ranks.first or site.saved is None:  # trained by all ranks, and then asked by the first
        for name, part in site.config.reward.weighted().items():
            if isinstance(part.reward, ModelRewardConfig) and part.reward.path is None:
                matter.untrained[name] = value_model(policy, Head.sequence)
    for model in {id(each): each for each in (policy, matter.reference, matter.critic) if each is not None}.values():
        matter.spread.lay(model)


def _spread(site: Site, policy: PreTrainedModel) -> Whole:
    if site.ranks.count > 1 and isinstance(site.config.trainer, ShardedConfig):
        return Sharded(site.ranks, policy.device)
    return Whole(site.ranks)


def _reference(policy: PreTrainedModel) -> PreTrainedModel:
    """A copy of the policy as it is, or the policy itself, which without its adapter is what it was."""
    return policy if has_adapter(policy) else copy.deepcopy(policy).requires_grad_(False)
