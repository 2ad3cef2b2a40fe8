"""The rewards that a run trains itself, before RL: reward models on preference pairs, by all ranks of the trainer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from rlhf.assembly.matter import Matter
from rlhf.assembly.site import Site
from rlhf.checkpoint.state import State
from rlhf.checkpoint.whole import whole
from rlhf.config import ModelRewardConfig
from rlhf.learning.microbatched import MicroBatched
from rlhf.learning.spread import Whole
from rlhf.models.saving import export_model
from rlhf.rewards.model import ModelReward
from rlhf.stages.dpo import as_json, from_json
from rlhf.stages.reward_model import check_pairs, margins, pairs_from, split, train_reward_model
from rlhf.types import Pair, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAIRS_SEED = 500_009  # added to the run's seed where preference pairs are sampled

Divided = tuple[list[Pair], list[Pair]]  # to train on, and held out


def train_rewards(site: Site, matter: Matter, sampler: Sampler) -> State:
    """Train the rewards that the run trains itself, and let the first rank have them; what it saves of them."""
    state = State()
    for name, model in matter.untrained.items():
        config = site.config.reward.weighted()[name].reward
        assert isinstance(config, ModelRewardConfig)
        pairs = _trained(site, matter, model, config, sampler) if site.saved is None else None
        if site.ranks.first:
            reward = ModelReward(model, matter.tokenizer, clip=config.clip)
            if pairs is not None:
                _note(site, matter, reward, pairs)
            model.requires_grad_(False)
            matter.rewards[name] = reward
            state |= reward.state(name)
    matter.untrained.clear()  # the others need theirs no more
    return state


def _trained(
    site: Site, matter: Matter, model: PreTrainedModel, config: ModelRewardConfig, sampler: Sampler
) -> Divided:
    """Train the model, a copy in each rank, on the pairs that the first one has; the pairs."""
    seed, task = site.config.seed + PAIRS_SEED, matter.task
    pairs = site.ranks.heard(
        partial(_pairs, site, matter, config, sampler),
        lambda pairs: as_json(*pairs),
        lambda told: from_json(told, task),
    )
    by = MicroBatched(site.config.optim, site.config.microbatch_tokens, Whole(site.ranks))
    by.spread.lay(model)
    stage = site.bars.stage("reward model", config.steps)
    for numbers in train_reward_model(model, matter.tokenizer, pairs[0], config, by, seed):
        stage.advance(numbers)
    return pairs


def _pairs(site: Site, matter: Matter, config: ModelRewardConfig, sampler: Sampler) -> Divided:
    """From the data or from the policy; ValueError where there are none to train on."""
    task, seed = matter.task, site.config.seed + PAIRS_SEED
    pairs = list(task.preferences)
    if not pairs:
        with site.bars.waiting("pairs"):
            prompts = task.train[: config.prompts]
            temperature = site.config.rollout.temperature
            rollouts = sampler.sample(prompts, n=config.samples, temperature=temperature, seed=seed)
            pairs = pairs_from(rollouts, task, config.label_noise, seed)
    training, held_out = split(pairs, config.held_out, seed)
    check_pairs(training)
    return training, held_out


def _note(site: Site, matter: Matter, reward: ModelReward, pairs: Divided) -> None:
    """The scale of a trained one, its accuracy and margin on held-out pairs, and its folder."""
    training, held_out = pairs
    reward.calibrate([p.prompt for p in training] * 2, [p.chosen for p in training] + [p.rejected for p in training])
    if held_out:
        with torch.no_grad():
            margins_B = margins(reward.model, reward.tokenizer, held_out)
        site.notes["reward_model_accuracy"] = float((margins_B > 0).float().mean())
        site.notes["reward_model_margin"] = float(margins_B.mean())
        site.notes["reward_model_pairs"] = len(training)
    with whole(site.folder / "reward_model") as folder:
        export_model(reward.model, matter.tokenizer, folder, site.config.model.save_dtype)
