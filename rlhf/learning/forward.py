"""Rows as tensors, and a model's pass over them.

Shapes: P prompts, B rows, L prompt tokens (left-padded), T response tokens (right-padded), V vocabulary. A prompt is
computed once for all of its samples: its keys and values are shared by their rows, with gradients. What comes out for a
vocabulary is used piece by piece, so that no [B, T, V] is put together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.learning import losses
from rlhf.learning.microbatches import length_groups
from rlhf.models.model_cache import cache_name, parameters_of
from rlhf.models.recompute import recomputing
from rlhf.types import TRUNCATED, Completion, Rollouts


@dataclass(slots=True)
class Batch:
    """Rows padded to tensors, and what is known about them before the update; None: this algorithm does not need it."""

    prompts: list[tuple[int, ...]]  # P
    prompt_of_B: list[int]  # by which a row is computed
    ids_BT: Tensor
    mask_BT: Tensor
    sampled_BT: Tensor  # the workers' log-probs
    truncated_B: Tensor  # whether the length limit has cut the row
    measured_B: Tensor  # whether the row has the workers' log-probs; without, they are 0
    old_BT: Tensor | None = None  # None: the policy that is updated is the old one, as in a step's first update
    ref_BT: Tensor | None = None
    values_BT: Tensor | None = None
    advantages_BT: Tensor | None = None
    returns_BT: Tensor | None = None
    samples: int | None = None  # rows that are samples, by their prompts' order: the first ones; None: all
    sample_of_B: list[int] | None = None  # to which others belong; None: there are no others
    group_of_B: list[int] | None = None  # the step's prompt that the row is of; None: as prompt_of_B
    known_lengths: list[int] | None = None  # what `lengths` says, while the mask stays as it is

    @property
    def groups(self) -> list[int]:
        """The step's prompt that each row is of."""
        return self.prompt_of_B if self.group_of_B is None else self.group_of_B

    def with_lengths(self) -> Batch:
        """The same, which knows its rows' lengths, so that nobody has to wait for the device to ask for them."""
        return replace(self, known_lengths=self.lengths())

    def lengths(self, rows: Sequence[int] | slice = slice(None)) -> list[int]:
        """Tokens of each row up to the last that counts, with those before it that the policy did not sample."""
        if self.known_lengths is not None:
            known = self.known_lengths
            return known[rows] if isinstance(rows, slice) else [known[row] for row in rows]
        places_T = torch.arange(1, self.mask_BT.shape[1] + 1, device=self.mask_BT.device)
        return (self.mask_BT[rows] * places_T).amax(dim=1).long().tolist()

    def of_no_weight(self) -> Batch:
        """The same, of which no token counts, though it is computed."""
        return replace(self, mask_BT=torch.zeros_like(self.mask_BT), known_lengths=self.lengths())

    def rows(self, rows: Sequence[int]) -> Batch:
        """These rows alone, padding cut to the longest of them."""
        used = sorted({self.prompt_of_B[row] for row in rows})
        lengths = self.lengths(rows)
        width = max([1, *lengths])

        def cut(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor[rows, :width]

        return Batch(
            prompts=[self.prompts[p] for p in used],
            prompt_of_B=[used.index(self.prompt_of_B[row]) for row in rows],
            truncated_B=self.truncated_B[rows],
            known_lengths=lengths,
            measured_B=self.measured_B[rows],
            **{name: cut(getattr(self, name)) for name in self.__slots__ if name.endswith("_BT")},
        )


def collate(rollouts: Rollouts, device: torch.device) -> Batch:
    """Pad the rows on the right; the mask comes from who said a token, never from token values."""
    completions, sample_of_B = _with_earlier(rollouts)
    rows = [completion.ids for completion in completions]
    width = max(1, *(len(row) for row in rows))

    def pad(columns: Sequence[Sequence[float]], dtype: type[np.generic]) -> Tensor:
        padded = np.zeros((len(columns), width), dtype)
        for row, values in zip(padded, columns, strict=True):
            row[: len(values)] = values  # read through the column's own memory
        return torch.from_numpy(padded).to(device)

    group_of_B = [b // rollouts.samples_per_prompt for b in sample_of_B]
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(c.prompt for c in completions if c.prompt))}
    shared = len(rollouts.prompts)  # of groups; rows' own are behind them
    own = len(completions) > len(rollouts.completions) or bool(prompts)
    of_row = zip(group_of_B, completions, strict=True)
    return Batch(
        prompts=[*(prompt.ids for prompt in rollouts.prompts), *prompts],
        prompt_of_B=[group if c.prompt is None else shared + prompts[c.prompt] for group, c in of_row],
        ids_BT=pad(rows, np.int64),
        mask_BT=pad([completion.mask for completion in completions], np.float32),
        sampled_BT=pad([completion.logprobs or () for completion in completions], np.float32),
        truncated_B=torch.tensor([c.finish_reason == TRUNCATED for c in completions], device=device),
        measured_B=torch.tensor([c.logprobs is not None for c in completions], device=device),
        samples=len(rollouts.completions) if own else None,
        sample_of_B=sample_of_B if own else None,
        group_of_B=group_of_B if own else None,
    )


def _with_earlier(rollouts: Rollouts) -> tuple[list[Completion], list[int]]:
    """All rows that are learned from, the samples first, and the sample that each is of."""
    rows = list(rollouts.completions)
    sample_of = list(range(len(rows)))
    for sample, completion in enumerate(rollouts.completions):
        rows += completion.earlier
        sample_of += [sample] * len(completion.earlier)
    return rows, sample_of


@dataclass(frozen=True, slots=True)
class Piece:
    """A model's outputs [b, t, V] for some of the rows, at the positions that predict their tokens from `start` on."""

    rows: list[int]
    start: int
    outputs_btV: Tensor

    @property
    def place(self) -> tuple[list[int], slice]:
        """Where it belongs in [B, T]."""
        return self.rows, slice(self.start, self.start + self.outputs_btV.shape[1])


Groups = Callable[[Sequence[int]], list[tuple[list[int], int]]]  # of rows, by their lengths: see microbatches.py


def response_pieces(model: PreTrainedModel, batch: Batch, groups: Groups = length_groups) -> Iterator[Piece]:
    """The model's outputs at the positions that predict each response token (V = 1 for a critic).

    Prompts are computed once for all of their rows, and short rows apart from long ones where that saves padding.
    """
    device = batch.ids_BT.device
    name = cache_name(model)
    prompts, cache, first_PV = _prompt_pass(model, batch.prompts, device)
    prompt_of_B = torch.tensor(batch.prompt_of_B, device=device)
    yield Piece(list(range(len(prompt_of_B))), 0, first_PV[prompt_of_B][:, None])
    for rows, width in groups(batch.lengths()):
        of_rows = prompt_of_B[rows]
        with recomputing(model, of_rows) as late:
            outputs_btV = model(
                input_ids=batch.ids_BT[rows, : width - 1],
                attention_mask=prompts.mask(of_rows, width - 1),
                position_ids=prompts.lengths_P[of_rows][:, None] + torch.arange(width - 1, device=device),
                use_cache=True,
                **{name: cache if late else _of_rows(cache, of_rows)},
            ).logits
        yield Piece(rows, 1, outputs_btV[:, : batch.ids_BT.shape[1] - 1])


def whole_pieces(model: PreTrainedModel, batch: Batch, groups: Groups = length_groups) -> Iterator[Piece]:
    """The same with each row whole, its prompt before it, and padding behind it: no cache, no mask, no positions.

    Nothing that comes later changes what a causal model says, so that this is right for all of them.
    """
    lengths = [len(batch.prompts[p]) + length for p, length in zip(batch.prompt_of_B, batch.lengths(), strict=True)]
    for rows, _ in groups(lengths):
        yield _whole(model, batch, rows)


def _whole(model: PreTrainedModel, batch: Batch, rows: list[int]) -> Piece:
    device, responses_bT = batch.ids_BT.device, batch.ids_BT[rows]
    prompts, known = [batch.prompts[batch.prompt_of_B[row]] for row in rows], batch.lengths(rows)
    longest, last = max(map(len, prompts)), responses_bT.shape[1] - 1
    width = max(len(prompt) + max(1, length) for prompt, length in zip(prompts, known, strict=True)) - 1
    padded_bL = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    prompts_b1 = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    place_W = torch.arange(width, device=device)
    source_bW = torch.where(place_W < prompts_b1, place_W, longest + (place_W - prompts_b1).clamp(max=last))
    late = {"logits_to_keep": width + 1 - min(map(len, prompts))} if "logits_to_keep" in parameters_of(model) else {}
    with recomputing(model):
        outputs_bWV = model(
            input_ids=torch.cat([padded_bL, responses_bT], dim=1).gather(1, source_bW), use_cache=False, **late
        ).logits
    first_b1 = prompts_b1 - 1 - (width - outputs_bWV.shape[1])
    predicting_bt = first_b1 + torch.arange(max(1, *known), device=device)
    predicting_bt1 = predicting_bt.clamp(max=outputs_bWV.shape[1] - 1)[..., None]
    return Piece(rows, 0, outputs_bWV.gather(1, predicting_bt1.expand(-1, -1, outputs_bWV.shape[2])))


Pieces = Callable[[PreTrainedModel, Batch], Iterator[Piece]]


def response_values(critic: PreTrainedModel, batch: Batch, pieces: Pieces = response_pieces) -> Tensor:
    """What a critic, whose V is 1, says before each response token [B, T]; 0 at padding."""
    values_BT = torch.zeros_like(batch.mask_BT)
    for piece in pieces(critic, batch):
        values_BT[piece.place] = piece.outputs_btV.squeeze(-1).float()
    return values_BT


def response_logprobs(
    model: PreTrainedModel, batch: Batch, temperature: float, pieces: Pieces = response_pieces
) -> Tensor:
    """log pi [B, T] of each response token under softmax(logits / temperature); 0 at padding."""
    logprobs_BT = torch.zeros_like(batch.mask_BT)
    for piece in pieces(model, batch):
        logprobs_BT[piece.place] = losses.token_logprobs(piece.outputs_btV, batch.ids_BT[piece.place], temperature)
    return logprobs_BT


def logprobs_and_entropy(
    model: PreTrainedModel, batch: Batch, temperature: float, entropy_gradient: bool, pieces: Pieces = response_pieces
) -> tuple[Tensor, Tensor]:
    """The same, and the entropy [B, T] of the distribution at each of them, in nats, with a gradient if asked for."""
    logprobs_BT, entropy_BT = torch.zeros_like(batch.mask_BT), torch.zeros_like(batch.mask_BT)
    for piece in pieces(model, batch):
        logprobs_BT[piece.place] = losses.token_logprobs(piece.outputs_btV, batch.ids_BT[piece.place], temperature)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy_BT[piece.place] = losses.entropy(piece.outputs_btV, temperature)
    return logprobs_BT, entropy_BT


@dataclass(slots=True)
class Prompts:
    """Left-padded prompts: their lengths [P], and their mask [P, L] where any is padded."""

    lengths_P: Tensor
    mask_PL: Tensor | None

    def mask(self, prompt_of_rows: Tensor, responses: int) -> Tensor | None:
        """The attention mask of these rows' prompts and `responses` more tokens; None where nothing is padded."""
        if self.mask_PL is None:
            return None
        return torch.nn.functional.pad(self.mask_PL[prompt_of_rows], (0, responses), value=1)


def _prompt_pass(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[Prompts, DynamicCache, Tensor]:
    """Keys and values of all prompts, and the outputs [P, V] that predict each first response token."""
    lengths_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(len(prompt) for prompt in prompts)
    ids_PL = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask_PL = (torch.arange(longest, device=device) >= longest - lengths_P[:, None]).long()
    padded = min(len(prompt) for prompt in prompts) < longest
    cache = DynamicCache(config=model.config)
    last_only = {"logits_to_keep": 1} if model.get_output_embeddings() is not None else {}
    with recomputing(model):
        outputs = model(
            **last_only,
            input_ids=ids_PL,
            attention_mask=mask_PL if padded else None,
            position_ids=(mask_PL.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=True,
            **{cache_name(model): cache},
        )
    return Prompts(lengths_P, mask_PL if padded else None), cache, outputs.logits[:, -1]


def _of_rows(cache: DynamicCache, prompt_of_rows: Tensor) -> DynamicCache:
    """A cache of its own for these rows; gradients reach the prompts' keys and values."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(prompt_of_rows)
    return chosen
