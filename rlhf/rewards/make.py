"""The rewards that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from rlhf.config import (
    FunctionRewardConfig,
    HttpRewardConfig,
    ModelConfig,
    ModelRewardConfig,
    RewardConfig,
    SumRewardConfig,
    VerifierRewardConfig,
)
from rlhf.config.rules import named_as_part
from rlhf.models.reward_model import load_reward_model, trained_by_a_run
from rlhf.rewards.function import FunctionReward
from rlhf.rewards.http import HttpReward
from rlhf.rewards.model import ModelReward
from rlhf.rewards.pretrained import PretrainedReward
from rlhf.rewards.rendering import OwnTemplate
from rlhf.rewards.verifier import VerifierReward
from rlhf.rewards.weighted_sum import WeightedSum
from rlhf.types import Reward, Task


def check_reward(config: RewardConfig, task: Task) -> None:
    """Raise ValueError where a reward and the task's data do not fit, RunError where a reward's server is not there."""
    has_gold = any(task.score(prompt, "") is not None for prompt in task.train)
    for name, part in config.weighted().items():
        with named_as_part(name):
            _check(part.reward, task, has_gold)


def _check(config: RewardConfig, task: Task, has_gold: bool) -> None:
    match config:
        case VerifierRewardConfig() if not has_gold:
            raise ValueError("reward=verifier needs answers to compare with, and no row has one: choose another reward")
        case ModelRewardConfig(path=None) if not (task.preferences or has_gold):
            raise ValueError(
                "reward=model needs chosen/rejected rows, or answers by which sampled pairs can be judged, and the "
                "task has neither: give reward.path, or choose another reward"
            )
        case FunctionRewardConfig():
            answers = [answer for _, answer in task.demonstrations[:1] if isinstance(answer, str)]
            _function(config).check(task.train, *answers)
        case HttpRewardConfig():
            HttpReward(config).check()


def given_rewards(
    config: RewardConfig, task: Task, model: ModelConfig, moment: datetime | None = None
) -> dict[str, Reward | None]:
    """The parts of the reward by name, "" where it is one; None is a reward model that the run has to train.

    Chat templates that ask for the date are told that of `moment`; None: today's.
    """
    given = {}
    for name, part in config.weighted().items():
        with named_as_part(name):
            given[name] = _given(part.reward, task, model, moment)
    return given


def _given(config: RewardConfig, task: Task, model: ModelConfig, moment: datetime | None) -> Reward | None:
    match config:
        case VerifierRewardConfig():
            return VerifierReward(task)
        case FunctionRewardConfig():
            return _function(config)
        case HttpRewardConfig():
            return HttpReward(config)
        case ModelRewardConfig(path=str()):
            return _loaded(config, task, model, moment)
        case ModelRewardConfig():
            return None
    raise AssertionError(config)


def _function(config: FunctionRewardConfig) -> FunctionReward:
    return FunctionReward(config.function, config.timeout_s, config.messages)


def _loaded(config: ModelRewardConfig, task: Task, policy: ModelConfig, moment: datetime | None) -> ModelReward:
    """The reward model of `reward.path`; ValueError where it does not fit the task's prompts."""
    assert config.path is not None
    model, tokenizer = load_reward_model(config.path, policy, config.trust_remote_code)
    template = OwnTemplate.of(tokenizer, config.chat_template, moment)
    kind = ModelReward if trained_by_a_run(model.config) else PretrainedReward
    reward = kind(model, tokenizer, template, config.clip)
    reward.check([*task.train, *task.held_out])
    return reward


def combine(config: RewardConfig, parts: Mapping[str, Reward | None]) -> Reward:
    """One reward of its parts, all of which exist by now."""
    there = {name: reward for name, reward in parts.items() if reward is not None}
    if not isinstance(config, SumRewardConfig):
        return there[""]
    return WeightedSum({name: (part.weight, there[name]) for name, part in config.weighted().items()})
