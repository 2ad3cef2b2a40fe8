"""What is trained, and what on: task, policy and rewards as a configuration names them, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rlhf.assembly.site import Site
from rlhf.checkpoint.rows import MOMENT, ROWS, check_rows, splits_of
from rlhf.config import GivenModelConfig, HfModelConfig, RunConfig, VllmRolloutConfig
from rlhf.config.trainer import ShardedConfig
from rlhf.learning.pass_choice import check_passes
from rlhf.learning.passes import PADDED, Passes
from rlhf.learning.spread import Whole
from rlhf.models.given import given_tokenizer
from rlhf.models.policy import make_policy
from rlhf.models.tokenizer import make_tokenizer
from rlhf.preflight.agreement import agreeing_passes
from rlhf.preflight.before_torch import Seen, look
from rlhf.preflight.gathering import announced, chosen, settled
from rlhf.preflight.invariance import check_invariance
from rlhf.preflight.lengths import check_lengths
from rlhf.preflight.old_samples import hardly_bounded
from rlhf.preflight.parts import check_parts
from rlhf.preflight.plan import check_data, in_one_line
from rlhf.preflight.policy_sizes import sizes_of
from rlhf.rewards import given_rewards
from rlhf.rewards.model import ModelReward
from rlhf.rollout.spec_of_run import is_invariant
from rlhf.tasks import make_task
from rlhf.types import Reward, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(slots=True)
class Matter:
    """What is trained, and what on."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    policy: PreTrainedModel
    rewards: dict[str, Reward | None]  # by part; None: the run trains it
    rows: dict[str, Any] = field(default_factory=dict)  # what the task's rows are, for checkpoints
    padded: Passes = PADDED  # the way to compute padded rows that is right for the policy
    spread: Whole = field(default_factory=Whole)  # how models lie over the trainer's ranks
    passes: Passes = PADDED  # the way in which the policy learns
    reference: PreTrainedModel | None = None
    critic: PreTrainedModel | None = None
    untrained: dict[str, PreTrainedModel] = field(default_factory=dict)  # reward models, by part of the reward


def tried(config: RunConfig, seen: Seen | None = None) -> Seen:
    """Others' parts, and what can be looked at without a model, if it is not `seen` yet; ValueError if it is wrong."""
    check_parts(config)
    return seen or look(config)


def gathered(site: Site, seen: Seen | None = None) -> Matter:
    """Task, policy and rewards as they are given, checked against each other; `seen`: what was tried already."""
    config = site.config
    seen = seen or tried(config)
    raw, objects = seen.take(), seen.objects
    tokenizer = given_tokenizer(objects.tokenizer, objects.policy)
    if tokenizer is None:
        tokenizer = make_tokenizer(config.model, raw.characters(), raw.conversational, raw.tags())
    began = site.saved.told["notes"].get(MOMENT) if site.saved else None
    moment = datetime.fromisoformat(site.ranks.told(began or datetime.now().isoformat()))
    task = make_task(raw, tokenizer, moment)
    rows = _rows(site, task, tokenizer)
    check_data(config, task)
    policy = make_policy(config.model, tokenizer, config.seed, objects.policy)
    notes = check_lengths(config, task, policy, tokenizer)
    padded = _padded(site, policy)
    check_passes(policy, config.model, padded)
    rewards = given_rewards(config.reward, task, config.model, moment, objects.rewards) if site.ranks.first else {}
    site.bars.say(in_one_line(config, policy))
    _settle_gathering(site, policy, rewards)
    for note in (*task.notes, *notes, *hardly_bounded(config)):
        site.bars.say(note)
    return Matter(task, tokenizer, policy, rewards, {ROWS: rows, MOMENT: moment.isoformat()}, padded)


def _settle_gathering(site: Site, policy: PreTrainedModel, rewards: Mapping[str, Reward | None]) -> None:
    """Let `trainer.gather=auto` be what fits the first rank's GPU, in all ranks, and say so."""
    config, given, ranks = site.config, site.config.trainer, site.ranks
    if not isinstance(given, ShardedConfig) or ranks.count == 1:
        return
    on_gpu = policy.device.type == "cuda"

    def choose() -> tuple[str, str]:
        dtype = getattr(torch, (config.rollout.dtype or config.model.dtype).value)
        models = [reward for reward in rewards.values() if isinstance(reward, ModelReward)]
        memory = torch.cuda.get_device_properties(policy.device).total_memory if on_gpu else None
        return chosen(config, partial(sizes_of, policy, config.model.lora, dtype, models), ranks.count, memory)

    gather, why = ranks.heard(choose)
    config.trainer = settled(given, gather, on_gpu)
    site.bars.say(announced(config.trainer, given, ranks.count, why))


def _rows(site: Site, task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the task's rows are; of a run that goes on, RunError if they are others than before."""
    settings = site.config.checkpoint
    if not settings.every and site.saved is None:
        return {}
    rows = splits_of(task, tokenizer)
    if site.saved is not None:
        said = check_rows(site.saved.told["notes"].get(ROWS), rows, task, allowed=not settings.check_data)
        if said:
            site.bars.say(said)
    return rows


def _padded(site: Site, policy: PreTrainedModel) -> Passes:
    """How to compute padded rows; a checkpoint may be of any architecture, and is tried."""
    config, passes = site.config, PADDED
    engine = not isinstance(config.rollout, VllmRolloutConfig)
    if isinstance(config.model, (HfModelConfig, GivenModelConfig)):
        passes = agreeing_passes(policy, config.model.lora, engine, site.bars.say)
    if engine and is_invariant(config, policy.device.type):
        try:
            check_invariance(policy, config.threads)
        except ValueError as error:
            if config.rollout.batch_invariant:
                raise
            config.rollout.batch_invariant = False  # as nobody has asked for it
            site.bars.say(f"warning: {error}")
    return passes
