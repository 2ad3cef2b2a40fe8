"""Rows as one sequence of tokens, behind each other and without padding; who sees whom in it, and what it predicts.

Shared: the prompts, then the responses, prompt by prompt. Every prompt is there once; a response sees it whole.

    prompt 0 | prompt 1 | response 0 of prompt 0 | response 1 of prompt 0 | response 0 of prompt 1 | ...

Whole: every row with a prompt of its own. The last token of a response predicts nothing and is left out.

Shapes: P prompts, B rows, T tokens of the sequence, S segments, N predicted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlhf.learning.forward import Batch
from rlhf.learning.microbatches import Sizes

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

    Output `predicting_N` of the sequence predicts the token at `places_N` of the batch's flattened [B, T].
    """

    ids_T: Tensor
    positions_T: Tensor
    segments: Segments
    predicting_N: Tensor
    places_N: Tensor


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
    return build(batch, rows, lengths)


def _shared(batch: Batch, rows: list[int], lengths: list[int]) -> Tokens:
    used = sorted({batch.prompt_of_B[row] for row in rows})
    place = {prompt: index for index, prompt in enumerate(used)}
    prompts = [len(batch.prompts[prompt]) for prompt in used]
    starts = _bounds(prompts)
    inner = [lengths[row] - 1 for row in rows]
    begins = starts[-1] + _bounds(inner)[:-1]
    grouped = [0] * len(used)
    for row, tokens in zip(rows, inner, strict=True):
        grouped[place[batch.prompt_of_B[row]]] += tokens
    first = np.array([starts[place[batch.prompt_of_B[row]] + 1] - 1 for row in rows])  # the prompt's last token
    segments = _segments([*prompts, *(n for n in inner if n)], prompts, grouped)
    positions = [np.arange(n) for n in prompts]
    positions += [len(batch.prompts[batch.prompt_of_B[row]]) + np.arange(n) for row, n in zip(rows, inner, strict=True)]
    predicting = [np.concatenate(([f], b + np.arange(n))) for f, b, n in zip(first, begins, inner, strict=True)]
    ids = [np.array(batch.prompts[prompt]) for prompt in used]
    return _assembled(batch, rows, _Parts(ids, positions, predicting, segments), lengths)


def _whole(batch: Batch, rows: list[int], lengths: list[int]) -> Tokens:
    prompts = [batch.prompts[batch.prompt_of_B[row]] for row in rows]
    inner = [lengths[row] - 1 for row in rows]
    full = [len(prompt) + n for prompt, n in zip(prompts, inner, strict=True)]
    starts = _bounds(full)
    predicting = [
        start + len(prompt) - 1 + np.arange(n + 1) for start, prompt, n in zip(starts[:-1], prompts, inner, strict=True)
    ]
    positions = [np.arange(n) for n in full]
    return _assembled(
        batch, rows, _Parts([np.array(p) for p in prompts], positions, predicting, _segments(full)), lengths
    )


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a sequence is put together from, by prompt or by row."""

    prompts: list[Ints]  # token ids: of each shared prompt, or of each row's
    positions: list[Ints]
    predicting: list[Ints]  # by row
    segments: Segments


def _assembled(batch: Batch, rows: list[int], parts: _Parts, lengths: list[int]) -> Tokens:
    """Token ids from the host (prompts) and from the batch (responses), in one copy to the device each."""
    device, width = batch.ids_BT.device, batch.ids_BT.shape[1]
    places = np.concatenate([row * width + np.arange(lengths[row]) for row in rows] or [np.zeros(0, np.int64)])
    responses = [row * width + np.arange(lengths[row] - 1) for row in rows]
    shared = int(parts.segments.sizes[0]) > 0
    known = np.concatenate(parts.prompts or [np.zeros(0, np.int64)])
    source = [np.arange(len(known))] if shared else []
    begin = 0
    for prompt, response in zip(parts.prompts if not shared else [None] * len(rows), responses, strict=True):
        if prompt is not None:
            source.append(begin + np.arange(len(prompt)))
            begin += len(prompt)
        source.append(len(known) + response)
    every = torch.cat([_there(known, device), batch.ids_BT.flatten()])
    chosen = np.concatenate(source or [np.zeros(0, np.int64)])
    return Tokens(
        ids_T=every[_there(chosen, device)],
        positions_T=_there(np.concatenate(parts.positions or [np.zeros(0, np.int64)]), device),
        segments=_moved(parts.segments, device),
        predicting_N=_there(np.concatenate(parts.predicting or [np.zeros(0, np.int64)]), device),
        places_N=_there(places, device),
    )


def _segments(lengths: Sequence[int], prompts: Sequence[int] = (), groups: Sequence[int] = ()) -> Segments:
    sizes = [sum(prompts), max(lengths, default=0), max(prompts, default=0), max(groups, default=0)]
    own, of_prompts, of_groups = (torch.from_numpy(_bounds(each)).int() for each in (lengths, prompts, groups))
    return Segments(own, of_prompts, of_groups, torch.tensor(sizes))


def _bounds(lengths: Sequence[int]) -> Ints:
    return np.array([0, *accumulate(lengths)])


def _there(values: Ints, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _moved(segments: Segments, device: torch.device) -> Segments:
    own, prompts, groups = (
        each.to(device, non_blocking=True) for each in (segments.bounds, segments.prompts, segments.groups)
    )
    return Segments(own, prompts, groups, segments.sizes)
