"""The rewards that a run trains itself, before RL: reward models on preference pairs."""

from __future__ import annotations

from typing import Any

import torch

from rlhf.assembly.matter import Matter
from rlhf.assembly.site import Site
from rlhf.checkpoint.state import State
from rlhf.checkpoint.whole import whole
from rlhf.config import ModelRewardConfig
from rlhf.models.saving import export_model
from rlhf.rewards.model import ModelReward
from rlhf.stages.reward_model import margins, pairs_from, split, train_reward_model
from rlhf.types import Sampler

PAIRS_SEED = 500_009  # added to the run's seed where preference pairs are sampled


def train_rewards(site: Site, matter: Matter, sampler: Sampler) -> State:
    """Fill in the rewards that the run trains itself; what of them a run that goes on will need."""
    state = State()
    for name, part in site.config.reward.weighted().items():
        if matter.rewards[name] is None:
            assert isinstance(part.reward, ModelRewardConfig)
            trained = ModelReward(matter.untrained[name], matter.tokenizer, clip=part.reward.clip)
            if site.saved is None:
                _train_reward(site, trained, part.reward, matter, sampler)
            trained.model.requires_grad_(False)
            matter.rewards[name] = trained
            state |= trained.state(name)
    return state


def _train_reward(site: Site, reward: ModelReward, config: Any, matter: Matter, sampler: Sampler) -> None:
    """Pairs from the data or from the policy, training, and the held-out accuracy and margin into the notes."""
    task, seed = matter.task, site.config.seed + PAIRS_SEED
    pairs = list(task.preferences)
    if not pairs:
        with site.bars.waiting("pairs"):
            prompts = task.train[: config.prompts]
            temperature = site.config.rollout.temperature
            rollouts = sampler.sample(prompts, n=config.samples, temperature=temperature, seed=seed)
            pairs = pairs_from(rollouts, task, config.label_noise, seed)
    training, held_out = split(pairs, config.held_out, seed)
    stage = site.bars.stage("reward model", config.steps)
    for numbers in train_reward_model(reward.model, reward.tokenizer, training, config, site.config.optim, seed):
        stage.advance(numbers)
    reward.calibrate([p.prompt for p in training] * 2, [p.chosen for p in training] + [p.rejected for p in training])
    if held_out:
        with torch.no_grad():
            margins_B = margins(reward.model, reward.tokenizer, held_out)
        site.notes["reward_model_accuracy"] = float((margins_B > 0).float().mean())
        site.notes["reward_model_margin"] = float(margins_B.mean())
        site.notes["reward_model_pairs"] = len(training)
    with whole(site.folder / "reward_model") as folder:
        export_model(reward.model, matter.tokenizer, folder, site.config.model.save_dtype)
