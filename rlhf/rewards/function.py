"""The user's function, whose exceptions cost samples, not the run."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.rewards.columns import columns, names
from rlhf.rewards.failures import as_rewards
from rlhf.types import Prompt, RewardReport

LONGEST_ERROR = 300  # characters of an exception that are shown, on one line


class FunctionReward:
    """The user's `(prompts, completions, **columns) -> list[float | None]`; columns are lists, one value a sample.

    Where it raises, it is called again sample by sample; those that raise again have no reward and are counted in
    `report`. ValueError if what it returns is no list of rewards.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.function = _import(name)
        self.report = RewardReport()

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        self.report = RewardReport(errors=0)
        return self._rewarded(prompts, answers)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """ValueError if the function does not take (prompts, completions, **columns) with these prompts' columns."""
        there = names(prompts)
        try:
            inspect.signature(self.function).bind([], [], **dict.fromkeys(there))
        except TypeError as error:
            raise ValueError(
                f"reward.function={self.name} is called as (prompts, completions, **columns), and the task's columns "
                f"are {', '.join(there) or 'none'}: {error}; change its arguments, or rename the column in the file"
            ) from None

    def _rewarded(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        try:
            return self._called(prompts, answers)
        except _RaisedError as raised:
            if len(answers) > 1:
                alone = [self._rewarded([p], [a]) for p, a in zip(prompts, answers, strict=True)]
                return [reward for rewards in alone for reward in rewards]
            self._count(raised.error)
            return [None] * len(answers)

    def _called(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        texts, others = [prompt.text for prompt in prompts], columns(prompts)
        try:
            rewards = self.function(texts, list(answers), **others)
        except Exception as error:
            raise _RaisedError(error) from error
        return as_rewards(f"reward.function={self.name}", rewards, len(answers))

    def _count(self, error: Exception) -> None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:LONGEST_ERROR]
        self.report.errors = (self.report.errors or 0) + 1
        self.report.error = (
            f"reward.function={self.name} raised {type(error).__name__}: {text} ({place.filename}:{place.lineno})"
        )


class _RaisedError(Exception):
    """The user's function raised `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _import(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # as `python -m` does; a console script does not
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"reward.function={name} cannot be imported, from the current folder or the Python path: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(function):
        raise ValueError(f"reward.function={name} must name a function (got {type(function).__name__})")
    return function
