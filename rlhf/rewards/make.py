"""The rewards that a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rlhf.config import (
    FunctionRewardConfig,
    GivenRewardConfig,
    HttpRewardConfig,
    JudgeRewardConfig,
    MathRewardConfig,
    ModelConfig,
    ModelRewardConfig,
    RewardConfig,
    SumRewardConfig,
    VerifierRewardConfig,
)
from rlhf.config.rules import named_as_part
from rlhf.models.reward_model import load_reward_model, trained_by_a_run
from rlhf.plugins.part import Part, PartError
from rlhf.plugins.registry import made, part_of
from rlhf.rewards.function import FunctionReward
from rlhf.rewards.http import HttpReward
from rlhf.rewards.judge import JudgeReward
from rlhf.rewards.mathematics import MathReward
from rlhf.rewards.own import looked_at
from rlhf.rewards.several import Given as Functions
from rlhf.rewards.several import SeveralFunctions, functions_of
from rlhf.rewards.verifier import VerifierReward
from rlhf.rewards.weighted_sum import WeightedSum
from rlhf.shell.ending import EXPLAINED
from rlhf.types import Amounts, Reward, Task
from transfer.agreement.shown import told

if TYPE_CHECKING:
    from rlhf.rewards.model import ModelReward


@dataclass(frozen=True, slots=True)
class Given:
    """What rewards are made of, beside their own dials."""

    task: Task
    model: ModelConfig  # the policy's
    moment: datetime | None = None  # what chat templates are told that ask for the date; None: today
    functions: Functions | None = None  # of a Python program


def check_reward(config: RewardConfig, task: Task) -> None:
    """Raise ValueError where a reward and the task's data do not fit, RunError where a reward's server is not there."""
    for name, part in config.weighted().items():
        with named_as_part(name):
            chosen = part_of(part.reward)
            chosen.maker()  # is there
            if check := chosen.checker():
                _asked(chosen, check, part.reward, task)


def _asked(part: Part, check: Callable[..., Any], config: RewardConfig, task: Task) -> None:
    """What the part's check says; PartError, in one line, where another's fails."""
    try:
        check(config, task)
    except EXPLAINED:
        raise
    except Exception as error:  # whatever it raises
        if part.ours:
            raise
        raise PartError(f"{part.chosen} ({part.where}): its check fails: {told(error)}") from error


def check_verifier(config: VerifierRewardConfig, task: Amounts) -> None:
    """Answers to compare with."""
    if not _has_gold(task):
        raise ValueError("reward=verifier needs answers to compare with, and no row has one: choose another reward")


def check_model(config: ModelRewardConfig, task: Amounts) -> None:
    """Something to train it on, if it is to be trained."""
    if config.path is None and not (task.preferences or _has_gold(task)):
        raise ValueError(
            "reward=model needs chosen/rejected rows, or answers by which sampled pairs can be judged, and the "
            "task has neither: give reward.path, or choose another reward"
        )


def check_function(config: FunctionRewardConfig, task: Task) -> None:
    """A trial of the function."""
    _try(functions_of(config), task)


def _try(functions: FunctionReward | SeveralFunctions, task: Task) -> None:
    answers = [answer for _, answer in task.demonstrations[:1] if isinstance(answer, str)]
    functions.check(task.train, *answers)


def check_http(config: HttpRewardConfig, task: Amounts) -> None:
    """A server that answers."""
    HttpReward(config).check()


def _has_gold(task: Amounts) -> bool:
    return any(task.score(prompt, "") is not None for prompt in task.train)


def given_rewards(
    config: RewardConfig,
    task: Task,
    model: ModelConfig,
    moment: datetime | None = None,
    functions: Functions | None = None,
) -> dict[str, Reward | None]:
    """The parts of the reward by name, "" where it is one; None is a reward model that the run has to train.

    Chat templates that ask for the date are told that of `moment`; None: today's. `functions`: of a Python program.
    """
    rewards: dict[str, Reward | None] = {}
    for name, part in config.weighted().items():
        with named_as_part(name):
            reward, chosen = made(part.reward, Given(task, model, moment, functions)), part_of(part.reward)
            rewards[name] = reward if chosen.ours else looked_at(chosen, reward, task)
    return rewards


def verifier(config: VerifierRewardConfig, given: Given) -> Reward:
    """The task's own score."""
    return VerifierReward(given.task)


def function(config: FunctionRewardConfig, given: Given) -> Reward:
    """The user's function."""
    return functions_of(config)


def given_functions(config: GivenRewardConfig, given: Given) -> Reward:
    """Functions of a Python program, after a trial of each."""
    functions = functions_of(config, given.functions)
    _try(functions, given.task)
    return functions


def http(config: HttpRewardConfig, given: Given) -> Reward:
    """The user's server."""
    return HttpReward(config)


def judge(config: JudgeRewardConfig, given: Given) -> Reward:
    """The user's judge."""
    return JudgeReward(config)


def mathematics(config: MathRewardConfig, given: Given) -> Reward:
    """Equality as mathematics."""
    return MathReward(config)


def reward_model(config: ModelRewardConfig, given: Given) -> Reward | None:
    """The reward model of `reward.path`; None: the run trains one."""
    return None if config.path is None else _loaded(config, given.task, given.model, given.moment)


def _loaded(config: ModelRewardConfig, task: Task, policy: ModelConfig, moment: datetime | None) -> ModelReward:
    """The reward model of `reward.path`; ValueError where it does not fit the task's prompts."""
    from rlhf.rewards.model import ModelReward
    from rlhf.rewards.pretrained import PretrainedReward
    from rlhf.rewards.rendering import OwnTemplate

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
