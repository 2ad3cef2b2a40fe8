"""Attention of packed rows in any dtype and on any device: segments are padded, a few at a time, and multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from rlhf.learning.packing import FULL, Segments

FEW, MANY = 2**18, 2**24  # scores of queries and keys that are held at a time


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int) -> Tensor:
    """The output [T, H, D] for q [T, H, D] and k, v [T, K, D]."""
    q_HTD, k_HTD, v_HTD = (_by_head(each, q.shape[1]) for each in (q, k, v))
    out_HTD = torch.empty_like(q_HTD)
    for few in _some(segments, q, window):
        weights = few.weights(few.queries(q_HTD), few.keys(k_HTD), scale)
        few.put(out_HTD, weights @ few.keys(v_HTD))
    return out_HTD.transpose(0, 1).to(q.dtype).contiguous()


def backward(parts: tuple[Tensor, ...], segments: Segments, scale: float, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; `parts` are the output's gradient, q, k and v."""
    gradient_HTD, q_HTD, k_HTD, v_HTD = (_by_head(each, parts[1].shape[1]) for each in parts)
    gq_HTD, gk_HTD, gv_HTD = (torch.zeros_like(q_HTD) for _ in range(3))
    for few in _some(segments, parts[1], window):
        queries, keys, values = few.queries(q_HTD), few.keys(k_HTD), few.keys(v_HTD)
        weights, of_out = few.weights(queries, keys, scale), few.queries(gradient_HTD).mul_(few.counts)
        of_weights = of_out @ values.transpose(1, 2)
        mean = (weights * of_weights).sum(dim=-1, keepdim=True)
        of_scores = of_weights.sub_(mean).mul_(weights).mul_(scale)
        few.put(gq_HTD, of_scores @ keys)
        few.add(gk_HTD, of_scores.transpose(1, 2) @ queries)
        few.add(gv_HTD, weights.transpose(1, 2) @ of_out)
    return _by_token(gq_HTD, parts[1]), _by_token(gk_HTD, parts[2]), _by_token(gv_HTD, parts[3])


def _by_head(each_TKD: Tensor, heads: int) -> Tensor:
    """[T, K, D] for each of the query's heads, [H, T, D] in fp32."""
    each_KTD = each_TKD.transpose(0, 1).float().contiguous()
    times = heads // len(each_KTD)
    return each_KTD if times == 1 else each_KTD.repeat_interleave(times, dim=0)


def _by_token(each_HTD: Tensor, like_TKD: Tensor) -> Tensor:
    """The inverse for gradients: those of heads that share a key are added up."""
    each_KTD = each_HTD.unflatten(0, (like_TKD.shape[1], -1)).sum(dim=1)
    return each_KTD.transpose(0, 1).to(like_TKD.dtype).contiguous()


@dataclass(frozen=True, slots=True)
class _Few:
    """S segments padded on the right, at most Q queries and K keys each; tensors of them are [H * S, Q or K, ...]."""

    query_n: Tensor  # places in the sequence, of the S * Q queries,
    key_n: Tensor  # and of the S * K keys
    real_t: Tensor  # which of the queries are no padding,
    place_t: Tensor  # and their places in the sequence
    counts: Tensor  # [S, Q, 1], repeated for H: 1, and 0 for padding
    hidden_SQK: Tensor  # 0, and -inf for what a query does not see

    def to(self, device: torch.device) -> _Few:
        """The same there."""
        return _Few(*(getattr(self, name).to(device) for name in self.__slots__))

    def queries(self, each_HTD: Tensor) -> Tensor:
        """Padding is a copy of the segment's last."""
        return each_HTD.index_select(1, self.query_n).view(-1, self.hidden_SQK.shape[1], each_HTD.shape[2])

    def keys(self, each_HTD: Tensor) -> Tensor:
        """Padding is a copy of the segment's last."""
        return each_HTD.index_select(1, self.key_n).view(-1, self.hidden_SQK.shape[2], each_HTD.shape[2])

    def weights(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """softmax(q k' scale)."""
        scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
        scores.view(-1, *self.hidden_SQK.shape).add_(self.hidden_SQK)
        return scores.softmax(dim=-1)

    def put(self, all_HTD: Tensor, queries: Tensor) -> None:
        """Write what belongs to the queries."""
        flat_HnD = queries.view(len(all_HTD), -1, all_HTD.shape[2])
        all_HTD.index_copy_(1, self.place_t, flat_HnD.index_select(1, self.real_t))

    def add(self, sums_HTD: Tensor, keys: Tensor) -> None:
        """Add gradients of keys or values; of padding they are 0."""
        sums_HTD.index_add_(1, self.key_n, keys.view(len(sums_HTD), -1, sums_HTD.shape[2]))


def _some(segments: Segments, q: Tensor, window: int) -> tuple[_Few, ...]:
    """All segments, those of like lengths together, with at most MANY scores."""
    bounds, prompts, groups = (each.cpu() for each in (segments.bounds, segments.prompts, segments.groups))
    told = (each.numpy().tobytes() for each in (bounds, prompts, groups))
    return _planned(*told, q.shape[1], window, q.device)


@lru_cache(maxsize=4)  # every layer asks for the same
def _planned(
    bounds: bytes, prompts: bytes, groups: bytes, heads: int, window: int, device: torch.device
) -> tuple[_Few, ...]:
    bounds_S, prompts_P, groups_P = (
        torch.from_numpy(np.frombuffer(each, np.int32).astype(np.int64)) for each in (bounds, prompts, groups)
    )
    begin_S, length_S = bounds_S[:-1], bounds_S.diff()
    seen_S, before_S = torch.zeros_like(begin_S), torch.zeros_like(begin_S)  # a response's prompt: its place and length
    shared = int(prompts_P[-1])
    if shared:
        answers = begin_S >= shared
        prompt_S = torch.searchsorted(groups_P, begin_S[answers] - shared, right=True) - 1
        seen_S[answers], before_S[answers] = prompts_P[prompt_S], prompts_P.diff()[prompt_S]
    order = torch.argsort(length_S + before_S, stable=True)
    parts = _parts(length_S[order].tolist(), (length_S + before_S)[order].tolist(), heads)
    columns = begin_S[:, None], length_S[:, None], seen_S[:, None], before_S[:, None]
    told = [[column[order[part]] for column in columns] for part in parts]
    return tuple(_few(four, heads, window).to(device) for four in told)


def _few(columns: Sequence[Tensor], heads: int, window: int) -> _Few:
    """Segments by where they begin, their length, and where the prompt begins of which they see so many tokens."""
    begin_S1, length_S1, seen_S1, before_S1 = columns
    query, key = torch.arange(int(length_S1.max())), torch.arange(int((length_S1 + before_S1).max()))
    last_S1 = begin_S1 + length_S1 - 1
    key_SK = torch.where(key < before_S1, seen_S1 + key, (begin_S1 + key - before_S1).minimum(last_S1))
    distance_SQK = (before_S1 + query)[:, :, None] - key
    hidden_SQK = (distance_SQK < 0) | (distance_SQK >= window) if window != FULL else distance_SQK < 0
    query_SQ, real_SQ = (begin_S1 + query).minimum(last_S1), query < length_S1
    return _Few(
        query_n=query_SQ.flatten(),
        key_n=key_SK.flatten(),
        real_t=real_SQ.flatten().nonzero()[:, 0],
        place_t=query_SQ[real_SQ],
        counts=real_SQ[..., None].float().repeat(heads, 1, 1),
        hidden_SQK=torch.zeros(hidden_SQK.shape).masked_fill_(hidden_SQK, -torch.inf),
    )


def _parts(queries: Sequence[int], keys: Sequence[int], heads: int) -> list[slice]:
    """Cut a list that is sorted by keys: after MANY scores, or after FEW where segments are twice as long by now."""
    parts, first, widest = [], 0, 0
    for place, (count, length) in enumerate(zip(queries, keys, strict=True)):
        widest = max(widest, count)
        scores = (place + 1 - first) * widest * length * heads
        if place > first and (scores > MANY or (scores > FEW and length > 2 * keys[first])):
            parts.append(slice(first, place))
            first, widest = place, count
    return [*parts, slice(first, len(keys))] if keys else []
