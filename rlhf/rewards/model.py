"""A reward model's scalar."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rlhf.checkpoint.state import State
from rlhf.stages.reward_model import score_texts
from rlhf.types import Prompt, Tokenizer


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

    def state(self, part: str = "") -> State:
        """What a run that goes on needs of a reward model that it has trained, as the reward or a part of it."""
        name = f"reward_model_{part}" if part else "reward_model"
        return State(
            modules={name: self.model}, attributes={f"{name}_mean": (self, "mean"), f"{name}_std": (self, "std")}
        )

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        return [max(-10.0, min(10.0, (raw - self.mean) / self.std)) for raw in self._raw(prompts, answers)]

    @torch.no_grad()
    def _raw(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        rows = [(prompt.text, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        asked = dict(zip(rows, prompts, strict=True))
        unique = list(asked)  # samples repeat themselves
        scores: dict[tuple[str, str], float] = {}
        for start in range(0, len(unique), self.batch_size):
            part = unique[start : start + self.batch_size]
            prompts_U, texts_U = [asked[row] for row in part], [text for _, text in part]
            values_U = score_texts(self.model, self.tokenizer, prompts_U, texts_U)
            scores |= zip(part, values_U.tolist(), strict=True)
        return [scores[row] for row in rows]
