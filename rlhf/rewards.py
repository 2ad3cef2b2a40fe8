"""(prompt, answer) -> number: the task's verifier, a reward model, or the user's function."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

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
        out: list[float] = []
        for start in range(0, len(answers), self.batch_size):
            end = start + self.batch_size
            texts = [prompt.text for prompt in prompts[start:end]]
            out += score_texts(self.model, self.tokenizer, texts, answers[start:end]).tolist()
        return out


class FunctionReward:
    """The user's `(prompts, completions, **columns) -> list[float | None]`; columns are lists, one value a sample."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.function = _import(name)

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        keys = sorted({key for prompt in prompts for key in prompt.columns})
        columns = {key: [prompt.columns.get(key) for prompt in prompts] for key in keys}
        rewards = self.function([prompt.text for prompt in prompts], list(answers), **columns)
        return self._checked(rewards, len(answers))

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
    """The rewards, if enough samples have one; RuntimeError above half without."""
    missing = sum(reward is None for reward in rewards)
    if missing > MAX_FAILED * len(rewards):
        raise RuntimeError(
            f"{missing} of {len(rewards)} samples have no reward (None), at most {MAX_FAILED:.0%} may: "
            f"check that the task's rows have what the reward needs (an answer column, say), or choose another reward"
        )
    return rewards


def _import(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # as `python -m` does; a console script does not
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward.function={name} cannot be imported: {error} (it is looked up on the Python path)"
        ) from None
    if not callable(function):
        raise ValueError(f"reward.function={name} must name a function (got {type(function).__name__})")
    return function
