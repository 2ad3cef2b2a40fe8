"""A reward model's scalar: of one that a run has trained; of other people's, pretrained.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.checkpoint.state import State
from rlhf.config.model import AUTO
from rlhf.models.encoding import prompt_ids
from rlhf.models.stop_tokens import ended
from rlhf.models.value import score_texts
from rlhf.rewards.failures import only_finite
from rlhf.rewards.rendering import OwnTemplate
from rlhf.types import Prompt, RewardReport, Tokenizer

NORMALISED_CLIP = 10.0  # standard deviations
TABLES = ("wpe", "embed_positions", "position_embeddings")  # transformers' names for learned positions


class ModelReward:
    """A reward model's scalar of prompt + answer + its end, normalised to mean 0 and standard deviation 1 on what
    `calibrate` was given, within +-`clip` (auto: 10).

    `template` renders the messages of a conversation where the model is of another run; None: the prompts' texts are
    its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        template: OwnTemplate | None = None,
        clip: Any = AUTO,
        batch_size: int = 512,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.clip: float | None = NORMALISED_CLIP if clip == AUTO else clip
        self.template = template
        self.mean = float(getattr(model.config, "reward_mean", 0.0))  # kept in the saved folder's config.json
        self.std = float(getattr(model.config, "reward_std", 1.0))
        self.positions = position_table(model)
        self.report = RewardReport()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """ValueError where the model's own chat template cannot render a prompt."""
        for prompt in prompts:
            self._asked(prompt, look=True)

    def calibrate(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> None:
        """Measure mean and standard deviation on these samples, and note them in the model's config."""
        raw = torch.tensor(self._raw(prompts, answers))
        self.mean, self.std = float(raw.mean()), float(raw.std().clamp(min=1e-6))
        if bool((raw == raw[0]).all()):  # there is no deviation that could be 1, and the mean of equal numbers rounds
            self.mean, self.std = float(raw[0]), 1.0
        self.model.config.reward_mean, self.model.config.reward_std = self.mean, self.std

    def state(self, part: str = "") -> State:
        """What a run that goes on needs of a reward model that it has trained, as the reward or a part of it."""
        name = f"reward_model_{part}" if part else "reward_model"
        return State(
            modules={name: self.model}, attributes={f"{name}_mean": (self, "mean"), f"{name}_std": (self, "std")}
        )

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        self.report = RewardReport()
        raws = self._raw(prompts, answers)
        scores = [None if raw is None else (raw - self.mean) / self.std for raw in raws]
        scores = only_finite("reward=model", scores, self.report)
        return scores if self.clip is None else self._clipped(scores, self.clip)

    def _clipped(self, scores: Sequence[float | None], clip: float) -> list[float | None]:
        self.report.counts["clipped"] = sum(score is not None and abs(score) > clip for score in scores)
        return [None if score is None else max(-clip, min(clip, score)) for score in scores]

    @torch.no_grad()
    def _raw(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Sequence[float | None]:
        """What the model says of each answer; None where it can say nothing."""
        once = {id(prompt): prompt for prompt in prompts}  # each has several answers
        asked_of = {each: self._asked(prompt) for each, prompt in once.items()}
        asked = [asked_of[id(prompt)] for prompt in prompts]
        rows = [(prompt.text, answer) for prompt, answer in zip(asked, answers, strict=True)]
        prompt_of = dict(zip(rows, asked, strict=True))  # samples repeat themselves
        unique = self._fitting(prompt_of)
        scores: dict[tuple[str, str], float] = {}
        for start in range(0, len(unique), self.batch_size):
            part = unique[start : start + self.batch_size]
            prompts_U, texts_U = [prompt_of[row] for row in part], [text for _, text in part]
            values_U = score_texts(self.model, self.tokenizer, prompts_U, texts_U)
            scores |= zip(part, values_U.tolist(), strict=True)
        self._count_long(sum(row not in scores for row in rows))
        return [scores.get(row) for row in rows]

    def _fitting(self, prompt_of: Mapping[tuple[str, str], Prompt]) -> list[tuple[str, str]]:
        """Those rows of prompt and answer that are no longer than `positions`."""
        if self.positions is None:
            return list(prompt_of)
        prompts = list(prompt_of.values())
        asked = prompt_ids(self.tokenizer, prompts)
        answered = ended(self.tokenizer, prompts, [answer for _, answer in prompt_of])
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(asked, answered, strict=True)]
        return [row for row, length in zip(prompt_of, lengths, strict=True) if length <= self.positions]

    def _count_long(self, rows: int) -> None:
        """So many rows were longer than `positions`, and have no score."""
        if rows:
            self.report.errors = rows
            self.report.error = (
                f"reward.path: rows are longer than the {self.positions} tokens that the reward model takes: lower "
                "rollout.max_new_tokens, or choose another reward model"
            )

    def _asked(self, prompt: Prompt, look: bool = False) -> Prompt:
        """The prompt with its text as the model has learned it; to `look`: ValueError if that leaves something out."""
        if self.template is None or not prompt.messages:
            return prompt
        return replace(prompt, text=self.template.asked(prompt, look))


def position_table(model: PreTrainedModel) -> int | None:
    """The tokens of a row for which the model has learned positions; None where they are computed, as RoPE's are."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TABLES and isinstance(module, torch.nn.Embedding):
            unused = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            return module.num_embeddings - unused
    return None
