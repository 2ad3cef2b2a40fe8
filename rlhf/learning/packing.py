"""Rows as one sequence of tokens, behind each other and without padding; who sees whom in it, and what it predicts.

Shared: the prompts, then the responses, prompt by prompt. Every prompt is there once; a response sees it whole.

    prompt 0 | prompt 1 | response 0 of prompt 0 | response 1 of prompt 0 | response 0 of prompt 1 | ...

Whole: every row with a prompt of its own. The last token of a response predicts nothing and is left out. A last
response that nobody learns from fills up to a multiple of STEP tokens.

Shapes: P prompts, B rows, T tokens of the sequence, S segments, N predicted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlhf.learning.forward import Batch
from rlhf.learning.microbatches import Sizes

STEP = 64  # few lengths of sequences, as kernels are prepared for each (bfloat16 on a CPU: milliseconds)
FULL = -1  # no window: a token sees all before it
SHARE = 0.05  # prompts are shared where that leaves out this share of all tokens: sharing costs a second attention

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segments:
    """Each segment sees itself causally; a response that shares its prompt also sees all of that.

    `bounds` int32 [S + 1] begin and end segments. Where prompts are shared they are the first P segments, `prompts`
    int32 [P + 1] their bounds, and `groups` int32 [P + 1] the bounds of each prompt's responses, counted from the first
    response. `sizes` int64 [4], on the host: tokens of all shared prompts (0: none is shared), the longest segment, the
    longest shared prompt, the most response tokens of a prompt.
    """

    bounds: Tensor
    prompts: Tensor
    groups: Tensor
    sizes: Tensor


@dataclass(frozen=True, slots=True)
class Tokens:
    """Rows packed: token ids and positions [T], the segments, and which outputs predict which tokens.

    Output `predicting_N` of the sequence predicts the token `targets_N`; the first n of them are at `places_n` of the
    batch's flattened [B, T], the others fill up to a multiple of STEP.
    """

    ids_T: Tensor
    positions_T: Tensor
    segments: Segments
    predicting_N: Tensor
    targets_N: Tensor
    places_n: Tensor


def shares(sizes: Sizes, rows: Sequence[int], window: int | None) -> bool:
    """Whether these rows' prompts are computed once for all of their rows.

    Not where a layer sees `window` tokens only and a row is longer: what a response sees of its prompt differs then by
    position.
    """
    counted: dict[int, int] = {}
    for row in rows:
        counted[sizes.prompt_of_B[row]] = counted.get(sizes.prompt_of_B[row], 0) + 1
    every = sum(sizes.prompts[sizes.prompt_of_B[row]] + sizes.responses_B[row] for row in rows)
    saved = sum((count - 1) * sizes.prompts[prompt] for prompt, count in counted.items())
    longest = max(sizes.prompts[sizes.prompt_of_B[row]] + sizes.responses_B[row] for row in rows)
    return saved >= SHARE * every and (window is None or longest <= window)


def packed(batch: Batch, window: int | None = None) -> Tokens:
    """The batch's rows as one sequence, on its device; rows of no tokens are left out."""
    lengths = batch.lengths()
    rows = [row for row, length in enumerate(lengths) if length]
    rows.sort(key=batch.prompt_of_B.__getitem__)  # stable: as they are where a prompt's rows follow each other
    sizes = Sizes([len(prompt) for prompt in batch.prompts], batch.prompt_of_B, lengths)
    build = _shared if rows and shares(sizes, rows, window) else _whole
    prompts = _bounds(sizes.prompts)
    known = np.array([token for prompt in batch.prompts for token in prompt], np.int64)
    width = batch.ids_BT.shape[1]
    answers = [_Answer(batch.prompt_of_B[row], len(known) + row * width + np.arange(lengths[row] - 1)) for row in rows]
    places = _joined([row * width + np.arange(lengths[row]) for row in rows])
    return _assembled(batch, known, build(prompts, answers), places)


@dataclass(frozen=True, slots=True)
class _Answer:
    """A row's response but for its last token: where its ids are, behind those of all prompts."""

    prompt: int
    source: Ints


@dataclass(frozen=True, slots=True)
class _Layout:
    """By segment: where its token ids are, and their positions; by row: which outputs predict it."""

    sources: list[Ints]
    positions: list[Ints]
    predicting: list[Ints]
    prompts: list[int]  # tokens of each shared prompt
    groups: list[int]  # tokens of its responses


def _shared(bounds: Ints, answers: list[_Answer]) -> _Layout:
    """`bounds` [P + 1] are those of all prompts' token ids."""
    used = sorted({answer.prompt for answer in answers})
    lengths = {prompt: int(bounds[prompt + 1] - bounds[prompt]) for prompt in used}
    ends = dict(zip(used, accumulate(lengths.values()), strict=True))
    groups = dict.fromkeys(used, 0)
    sources = [np.arange(bounds[prompt], bounds[prompt + 1]) for prompt in used]
    positions = [np.arange(length) for length in lengths.values()]
    predicting, begin = [], sum(lengths.values())
    for answer in answers:
        tokens = len(answer.source)
        predicting.append(np.concatenate(([ends[answer.prompt] - 1], begin + np.arange(tokens))))
        sources.append(answer.source)
        positions.append(lengths[answer.prompt] + np.arange(tokens))
        groups[answer.prompt] += tokens
        begin += tokens
    return _Layout(sources, positions, predicting, list(lengths.values()), list(groups.values()))


def _whole(bounds: Ints, answers: list[_Answer]) -> _Layout:
    """As `_shared`, but that every row has its prompt."""
    layout, begin = _Layout([], [], [], [], []), 0
    for answer in answers:
        prompt = np.arange(bounds[answer.prompt], bounds[answer.prompt + 1])
        source = np.concatenate((prompt, answer.source))
        layout.sources.append(source)
        layout.positions.append(np.arange(len(source)))
        layout.predicting.append(begin + len(prompt) - 1 + np.arange(len(answer.source) + 1))
        begin += len(source)
    return layout


def _assembled(batch: Batch, known: Ints, layout: _Layout, places: Ints) -> Tokens:
    """Token ids from the host (prompts) and from the batch (responses), one copy to the device each; filled up."""
    device, flat = batch.ids_BT.device, batch.ids_BT.flatten()
    filler = np.zeros(_missing(sum(map(len, layout.sources))), np.int64)
    if len(filler):  # it is a last response, which predicts nothing
        layout.sources.append(filler)
        layout.positions.append(np.arange(len(filler)))
        if layout.groups:
            layout.groups[-1] += len(filler)
    places_N = _there(places, device)
    unused = _missing(len(places))
    every = torch.cat([_there(known, device), flat])
    return Tokens(
        ids_T=every[_there(_joined(layout.sources), device)],
        positions_T=_there(_joined(layout.positions), device),
        segments=segments_of([len(source) for source in layout.sources], layout.prompts, layout.groups, device),
        predicting_N=_there(np.concatenate((_joined(layout.predicting), np.zeros(unused, np.int64))), device),
        targets_N=torch.nn.functional.pad(flat[places_N], (0, unused)),
        places_n=places_N,
    )


def segments_of(
    lengths: Sequence[int], prompts: Sequence[int], groups: Sequence[int], device: torch.device
) -> Segments:
    """Segments of these lengths, on the device; tokens of each shared prompt, and of the responses to it."""
    sizes = [sum(prompts), max(lengths, default=0), max(prompts, default=0), max(groups, default=0)]
    bounds = (_bounds([length for length in lengths if length]), _bounds(prompts), _bounds(groups))
    own, of_prompts, of_groups = (_there(each.astype(np.int32), device) for each in bounds)
    return Segments(own, of_prompts, of_groups, torch.tensor(sizes))


def _missing(count: int) -> int:
    """To the next multiple of STEP, of which there is at least one."""
    return -count % STEP or (STEP if not count else 0)


def _bounds(lengths: Sequence[int]) -> Ints:
    return np.array([0, *accumulate(lengths)])


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([*parts, np.zeros(0, np.int64)])


def _there(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
