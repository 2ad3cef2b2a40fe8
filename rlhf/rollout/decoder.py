"""The model with its cache, for a batch of rows that grow by a token at a time; engine `hf` draws from its logits.

Shapes: P prompts, R rows still in the batch (at first P*n), L prompt positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlhf.models.model_cache import cache_name, cache_of, parameters_of, recurrent
from rlhf.rollout.invariant import BLOCK, filled, padded_width, prompts_at_least
from rlhf.rollout.sampling import Sampling

Key = Any  # by which prompts are put together


class Decoder:
    """The model with its cache: `logits` [R, V] of the next token of each row.

    Prompts of one length need neither padding nor mask nor position ids, which is what models are fastest at; others
    are padded on the left, so that all rows grow at the right end together.
    """

    logits: torch.Tensor

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, width: int | None = None
    ) -> None:
        """`width`: to which prompts are padded; None: to that of the longest."""
        self._model = model
        self._device = next(model.parameters()).device
        self._known = parameters_of(model)
        self._name = cache_name(model)
        self._counts = recurrent(model) and "position_ids" in self._known  # some forget what is in their cache
        self._cache: Any = None
        self._width = width or max(map(len, prompts))
        self._mask: torch.Tensor | None = None  # [R, L + max_tokens], 0 on padding
        ids = torch.tensor([[0] * (self._width - len(prompt)) + list(prompt) for prompt in prompts])
        if min(map(len, prompts)) < self._width:
            mask = torch.ones(len(prompts), self._width + sampling.max_tokens, dtype=torch.long)
            for row, prompt in enumerate(prompts):
                mask[row, : self._width - len(prompt)] = 0
            self._mask = mask.to(self._device)
        self._forward(ids.to(self._device))
        if sampling.n > 1:
            group = np.repeat(np.arange(len(prompts)), sampling.n)
            self.logits = self.logits[torch.from_numpy(group).to(self._device)]
            if sampling.max_tokens > 1:
                self.select(group)

    def select(self, rows: np.ndarray) -> None:
        """Make the batch consist of these of its rows, in this order, repeats allowed."""
        index = torch.from_numpy(rows).to(self._device)
        self._cache.reorder_cache(index)
        if self._mask is not None:
            self._mask = self._mask[index]

    def step(self, ids: torch.Tensor) -> None:
        """Append one token [R] to each row."""
        self._width += 1
        self._forward(ids[:, None])

    def _forward(self, ids: torch.Tensor) -> None:
        arguments: dict[str, Any] = {self._name: self._cache, "use_cache": True}
        if self._mask is not None:
            mask = arguments["attention_mask"] = self._mask[:, : self._width]
            if "position_ids" in self._known:
                arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        elif self._counts:
            first = self._width - ids.shape[1]
            arguments["position_ids"] = torch.arange(first, self._width, device=self._device).expand(len(ids), -1)
        if "logits_to_keep" in self._known:
            arguments["logits_to_keep"] = 1
        output = self._model(input_ids=ids, **arguments)
        self._cache = cache_of(output)
        self.logits = output.logits[:, -1]


class Filled:
    """As Decoder, with a batch that is filled up with repeats of its first row, as invariant.py wants it."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, width: int) -> None:
        self._rows = len(prompts) * sampling.n
        some = [prompts[place] for place in filled(np.arange(len(prompts)), prompts_at_least(width))]
        self._decoder = Decoder(model, some, replace(sampling, n=1), width)
        group = filled(np.repeat(np.arange(len(prompts)), sampling.n), BLOCK)
        self._decoder.logits = self._decoder.logits[torch.from_numpy(group).to(self._decoder.logits.device)]
        if sampling.max_tokens > 1:
            self._decoder.select(group)

    @property
    def logits(self) -> torch.Tensor:
        """As Decoder has it."""
        return self._decoder.logits[: self._rows]

    def select(self, rows: np.ndarray) -> None:
        """As Decoder has it."""
        self._rows = len(rows)
        self._decoder.select(filled(rows, BLOCK))

    def step(self, ids: torch.Tensor) -> None:
        """As Decoder has it."""
        self._decoder.step(ids[torch.from_numpy(filled(np.arange(len(ids)), BLOCK)).to(ids.device)])


class Apart:
    """As Decoder, with prompts that have the same key in a batch of their own each.

    By their lengths, say: then nothing is padded.
    """

    logits: torch.Tensor

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        keys: Sequence[Key],
        make: Callable[[Sequence[Sequence[int]], Key], Decoder | Filled],
    ) -> None:
        self._parts: list[tuple[np.ndarray, Decoder | Filled]] = []  # with the places of its rows in the batch
        for key in sorted(set(keys)):
            chosen = np.array([place for place, each in enumerate(keys) if each == key])
            places = (chosen[:, None] * n + np.arange(n)).ravel()
            self._parts.append((places, make([prompts[index] for index in chosen.tolist()], key)))
        self._join(len(prompts) * n)

    def select(self, rows: np.ndarray) -> None:
        """As Decoder has it."""
        parts = []
        for places, decoder in self._parts:
            there = np.flatnonzero(np.isin(rows, places))
            if len(there):
                decoder.select(np.searchsorted(places, rows[there]))
                parts.append((there, decoder))
        self._parts = parts

    def step(self, ids: torch.Tensor) -> None:
        """As Decoder has it."""
        for places, decoder in self._parts:
            decoder.step(ids[torch.from_numpy(places).to(ids.device)])
        self._join(len(ids))

    def _join(self, rows: int) -> None:
        first = self._parts[0][1].logits
        self.logits = first.new_empty(rows, first.shape[1])
        for places, decoder in self._parts:
            self.logits[torch.from_numpy(places).to(first.device)] = decoder.logits


def make_decoder(model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Decoder | Apart:
    """Prompts of different lengths are padded, but for a model that would see the padding.

    Recurrent layers do, and positions that nobody can tell.
    """
    lengths = [len(prompt) for prompt in prompts]
    if len(set(lengths)) > 1 and sees_padding(model):
        return Apart(prompts, sampling.n, lengths, lambda some, _: Decoder(model, some, sampling))
    return Decoder(model, prompts, sampling)


def make_invariant_decoder(model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Apart:
    """Prompts are padded to widths that follow from their own lengths, or not at all, and only such share a batch."""
    lengths = [len(prompt) for prompt in prompts]
    if sees_padding(model):
        widths = lengths
    else:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        most = None if positions is None else positions - sampling.max_tokens
        widths = [padded_width(length, most) for length in lengths]
    keys = [(width, width > length) for width, length in zip(widths, lengths, strict=True)]
    return Apart(prompts, sampling.n, keys, lambda some, key: Filled(model, some, sampling, key[0]))


def sees_padding(model: Any) -> bool:
    """Whether the model would compute something else of a row with padding before it."""
    return recurrent(model) or "position_ids" not in parameters_of(model)
