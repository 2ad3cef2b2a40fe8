"""(prompt, answer) -> number: the task's verifier, a reward model, or the user's function."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.ending import RunError
from rlhf.stages.reward_model import score_texts
from rlhf.types import Prompt, Task, Tokenizer

MAX_FAILED = 0.5  # share of a step's samples without a reward, above which the run stops


class VerifierReward:
    """The task's own score."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        return [self.task.score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


class ModelReward:
    """A reward model's scalar, normalised to mean 0 and standard deviation 1 on `calibrate`'s samples, within +-10."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, batch_size: int = 512) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.mean = float(getattr(model.config, "reward_mean", 0.0))  # kept in the saved folder's config.json
        self.std = float(getattr(model.config, "reward_std", 1.0))

    def calibrate(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> None:
        """Measure mean and standard deviation on these samples, and note them in the model's config."""
        raw = torch.tensor(self._raw(prompts, answers))
        self.mean, self.std = float(raw.mean()), float(raw.std().clamp(min=1e-6))
        self.model.config.reward_mean, self.model.config.reward_std = self.mean, self.std

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        return [max(-10.0, min(10.0, (raw - self.mean) / self.std)) for raw in self._raw(prompts, answers)]

    @torch.no_grad()
    def _raw(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        rows = [(prompt.text, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        unique = list(dict.fromkeys(rows))  # samples repeat themselves
        scores: dict[tuple[str, str], float] = {}
        for start in range(0, len(unique), self.batch_size):
            part = unique[start : start + self.batch_size]
            values_U = score_texts(self.model, self.tokenizer, [text for text, _ in part], [text for _, text in part])
            scores |= zip(part, values_U.tolist(), strict=True)
        return [scores[row] for row in rows]


class FunctionReward:
    """The user's `(prompts, completions, **columns) -> list[float | None]`; columns are lists, one value a sample."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.function = _import(name)

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        columns = {key: [prompt.columns.get(key) for prompt in prompts] for key in _columns(prompts)}
        try:
            rewards = self.function([prompt.text for prompt in prompts], list(answers), **columns)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise RunError(
                f"reward.function={self.name} raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
            ) from error
        return self._checked(rewards, len(answers))

    def check(self, prompts: Sequence[Prompt]) -> None:
        """ValueError if the function does not take (prompts, completions, **columns) with these prompts' columns."""
        columns = _columns(prompts)
        try:
            inspect.signature(self.function).bind([], [], **dict.fromkeys(columns))
        except TypeError as error:
            raise ValueError(
                f"reward.function={self.name} is called as (prompts, completions, **columns), and the task's columns "
                f"are {', '.join(columns) or 'none'}: {error}; change its arguments, or rename the column in the file"
            ) from None

    def _checked(self, rewards: Any, expected: int) -> list[float | None]:
        if not isinstance(rewards, (list, tuple)) or len(rewards) != expected:
            given = f"{len(rewards)} values" if isinstance(rewards, (list, tuple)) else type(rewards).__name__
            raise ValueError(
                f"reward.function={self.name} must return a list of {expected} numbers or None (got {given})"
            )
        for value in rewards:
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"reward.function={self.name} must return finite numbers or None (got {value!r})")
        return [None if value is None else float(value) for value in rewards]


def usable(rewards: Sequence[float | None]) -> Sequence[float | None]:
    """The rewards, if enough samples have one; RunError above half without."""
    missing = sum(reward is None for reward in rewards)
    if missing > MAX_FAILED * len(rewards):
        raise RunError(
            f"{missing} of {len(rewards)} samples have no reward (None), at most {MAX_FAILED:.0%} may: "
            f"check that the task's rows have what the reward needs (an answer column, say), or choose another reward"
        )
    return rewards


def _columns(prompts: Sequence[Prompt]) -> list[str]:
    return sorted({key for prompt in prompts for key in prompt.columns})


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
