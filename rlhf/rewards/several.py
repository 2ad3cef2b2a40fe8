"""A list of functions, as TRL's `reward_funcs`: a sample's reward is the weighted sum over those that give it one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rlhf.config import FunctionRewardConfig
from rlhf.monitor.metrics import mean
from rlhf.rewards.failures import only_finite
from rlhf.rewards.function import FunctionReward
from rlhf.rewards.samples import Rewards, Samples
from rlhf.types import Prompt, RewardReport

Given = Mapping[str, Callable[..., Any]]  # functions of a Python program, by the names that its configuration has


class SeveralFunctions:
    """sum_i w_i r_i over the functions, by name; one that returns None of a sample is not for it, and adds nothing.

    None where all have returned None, or where one of them has failed. `report` has each function's mean.
    """

    def __init__(self, functions: Mapping[str, tuple[float, FunctionReward]]) -> None:
        self.functions = dict(functions)
        self.report = RewardReport()

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Rewards:
        return self.begin(Samples(prompts, answers))()

    def begin(self, samples: Samples) -> Callable[[], Rewards]:
        """Start those that are asynchronous on these samples; what is returned gives the sums."""
        self.report = RewardReport(errors=0)
        return partial(self._summed, {name: each.begin(samples) for name, (_, each) in self.functions.items()})

    def close(self) -> None:
        """End the processes of their own, if there are any."""
        for _, function in self.functions.values():
            function.close()

    def check(self, prompts: Sequence[Prompt], answer: str = "") -> None:
        """ValueError if one of them does not take what it will be given, or returns no reward for one sample."""
        for _, function in self.functions.values():
            function.check(prompts, answer)

    def check_columns(self, there: Sequence[str]) -> None:
        """ValueError if one of them does not take a task's columns."""
        for _, function in self.functions.values():
            function.check_columns(there)

    def _summed(self, waiting: Mapping[str, Callable[[], Rewards]]) -> Rewards:
        told: list[list[float | None]] = []  # by function: a number to add, or None where it has failed
        given: list[list[bool]] = []
        for name, (weight, function) in self.functions.items():
            rewards = waiting[name]()
            self._note(name, function, rewards)
            values = zip(rewards, function.abstained, strict=True)
            told.append([0.0 if none else None if r is None else weight * r for r, none in values])
            given.append([not none for none in function.abstained])
        sums = [
            sum(value for value in values if value is not None) if None not in values and any(there) else None
            for values, there in zip(zip(*told, strict=True), zip(*given, strict=True), strict=True)
        ]
        return only_finite("reward.function", sums, self.report)

    def _note(self, name: str, function: FunctionReward, rewards: Rewards) -> None:
        average, report = mean(rewards), function.report
        if average is not None:
            self.report.means[name] = average
        for befell, count in report.counts.items():
            self.report.counts[befell] = self.report.counts.get(befell, 0) + count
        self.report.errors = (self.report.errors or 0) + (report.errors or 0)
        self.report.error = self.report.error or report.error


def functions_of(config: FunctionRewardConfig, given: Given | None = None) -> FunctionReward | SeveralFunctions:
    """The function, or all of a list; `given`: those that need not be imported."""
    if isinstance(config.function, str):
        return _one(config, config.function, given)
    named = zip(_short(config.function), config.function, config.weights or [1.0] * len(config.function), strict=True)
    return SeveralFunctions({short: (weight, _one(config, name, given)) for short, name, weight in named})


def _one(config: FunctionRewardConfig, name: str, given: Given | None) -> FunctionReward:
    return FunctionReward(name, config.timeout_s, config.messages, config.process, (given or {}).get(name))


def _short(names: Sequence[str]) -> list[str]:
    """Functions' names without their modules, as metrics have them; with them, where two are the same."""
    short = [name.partition(":")[2] for name in names]
    return short if len(set(short)) == len(short) else [name.replace(":", ".") for name in names]
