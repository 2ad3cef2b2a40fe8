"""Attention of packed rows (packing.py), in place of a transformers model's own.

On a GPU, in half precision, it is FlashAttention 2 by lengths (torch's own kernels): one call in which every segment
sees itself, and, where prompts are shared, one in which the responses of a prompt see it whole. Two softmaxes over
disjoint keys are joined by their log-sum-exps, and the gradient of each part follows from the joint output and the
joint log-sum-exp, as in ring attention (arXiv:2310.01889). Elsewhere segments are padded, a
few at a time, and multiplied.

Both are one operator for torch.compile, which does not look into it.

Shapes: T tokens, H heads, K key/value heads, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from rlhf.learning.packing import Segments

NAME = "rlhf_packed"
LARGEST_HEAD = 256  # numbers, a multiple of 8: of FlashAttention 2
FULL = -1  # no window
SLIDING = "sliding_attention"  # a layer's type in a transformers configuration
FEW, MANY = 2**18, 2**24  # scores of queries and keys that are held at a time, where FlashAttention is not there
_NOW: dict[str, Tensor] = {}  # the segments of the sequence that is computed


class Unsupported(ValueError):
    """A model's attention that is not computed here; the reason in words."""


@contextmanager
def attending(model: PreTrainedModel, segments: Segments) -> Iterator[None]:
    """The model's attention layers see, inside, what the segments say; one model at a time."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    before, others = [config._attn_implementation for config in configs], dict(_NOW)
    _NOW.update(bounds=segments.bounds, prompts=segments.prompts, groups=segments.groups, sizes=segments.sizes)
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _NOW.clear()
        _NOW.update(others)


def window_of(model: PreTrainedModel) -> int | None:
    """The fewest tokens that any layer sees; None where all see everything.

    Unsupported where layers see by other rules.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [SLIDING])
    if other := sorted(kinds - {"full_attention", SLIDING}):
        raise Unsupported(f"{type(model).__name__} has layers of {', '.join(other)}, which know no packed rows")
    return _window_by(config) if SLIDING in kinds else None


def _window_by(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    return int(window) if window and getattr(config, "use_sliding_window", True) else None


def _slides(module: torch.nn.Module) -> bool:
    """Whether an attention layer sees a window only, by its configuration."""
    config: Any = getattr(module, "config", None)
    kinds, place = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and place is not None:
        return kinds[place] == SLIDING and _window_by(config) is not None
    return _window_by(config) is not None


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if options.get(name) is not None:
            raise Unsupported(f"its attention has {name}, which packed attention does not compute")
    if not options.get("sliding_window") and not torch.compiler.is_compiling() and _slides(module):
        raise Unsupported(
            "its attention has a window and tells it by a mask alone, which packed attention does not read"
        )
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    window = options.get("sliding_window") or FULL
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    now = [_NOW["bounds"], _NOW["prompts"], _NOW["groups"], _NOW["sizes"]]
    return packed_attention(q, k, v, now, scale, window)[0][None], None


AttentionInterface.register(NAME, _attend)


def flashes(q_THD: Tensor) -> bool:
    """Whether FlashAttention takes these queries."""
    size = q_THD.shape[-1]
    return q_THD.is_cuda and q_THD.dtype in (torch.bfloat16, torch.float16) and size <= LARGEST_HEAD and not size % 8


# --- the operator -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("rlhf::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Tensor], scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """The output [T, H, D] for q [T, H, D] and k, v [T, K, D]; by FlashAttention also the log-sum-exps [H, T], else 0.

    `segments` are the fields of Segments.
    """
    who = Segments(*segments)
    if flashes(q):
        return _flash((q, k, v), who, scale, window)
    return by_segments(q, k, v, who, scale, window), q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)


@packed_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("rlhf::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    parts: Sequence[Tensor], segments: Sequence[Tensor], scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`parts`: the gradient of the output, q, k, v, the output, its log-sum-exps."""
    if flashes(parts[1]):
        return _flash_backward(tuple(parts), Segments(*segments), scale, window)
    return _by_segments_backward(tuple(parts[:4]), Segments(*segments), scale, window)


@_packed_attention_backward.register_fake
def _(parts: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = parts[1:4]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, segments, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, *segments)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, out, lse, *segments = ctx.saved_tensors
    parts = [gradient.contiguous(), q, k, v, out, lse]
    return *_packed_attention_backward(parts, segments, ctx.scale, ctx.window), [None] * len(segments), None, None


packed_attention.register_autograd(_gradients, setup_context=_keep)


# --- FlashAttention ---------------------------------------------------------------------------------------------------

Tensors = tuple[Tensor, ...]
Bounds = tuple[Tensor, Tensor]  # of queries and of keys
Longest = tuple[int, int]


def _flash(qkv: Tensors, segments: Segments, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """Everybody's own segment, then the responses' prompts, joined."""
    q, k, v = qkv
    shared, longest, longest_prompt, longest_group = segments.sizes.tolist()
    own = segments.bounds, segments.bounds
    out, lse = _forward(qkv, own, (longest, longest), scale, window if window < longest else FULL)
    if shared and longest_group:
        parts, theirs_are = (q[shared:], k[:shared], v[:shared]), (segments.groups, segments.prompts)
        theirs, theirs_lse = _forward(parts, theirs_are, (longest_group, longest_prompt), scale, None)
        both = torch.logaddexp(lse[:, shared:], theirs_lse)
        share = (theirs_lse - both).exp().T[..., None]
        out[shared:] = out[shared:].float().lerp_(theirs.float(), share)
        lse[:, shared:] = both
    return out, lse


def _flash_backward(parts: Tensors, segments: Segments, scale: float, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, the same in every run."""
    gradient, q, k, v, out, lse = parts
    shared, longest, longest_prompt, longest_group = segments.sizes.tolist()
    own = segments.bounds, segments.bounds
    gq, gk, gv = _backward(parts, own, (longest, longest), scale, window if window < longest else FULL)
    if shared and longest_group:
        rest = gradient[shared:], q[shared:], k[:shared], v[:shared], out[shared:], lse[:, shared:].contiguous()
        bounds = segments.groups, segments.prompts
        tq, tk, tv = _backward(rest, bounds, (longest_group, longest_prompt), scale, None)
        gq[shared:] += tq
        gk[:shared] += tk
        gv[:shared] += tv
    return gq, gk, gv


def _window(window: int | None) -> dict[str, int]:
    """A query's `window` newest keys; FULL: all before it. None: all keys, as of another sequence."""
    return {} if window is None or window == FULL else {"window_size_left": window - 1, "window_size_right": 0}


def _forward(qkv: Tensors, bounds: Bounds, longest: Longest, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    causal = window is not None
    flash = torch.ops.aten._flash_attention_forward
    out, lse, *_ = flash(*qkv, *bounds, *longest, 0.0, causal, False, scale=scale, **_window(window))
    assert lse.shape == (out.shape[1], out.shape[0]), "a log-sum-exp a head and a token"
    return out, lse


def _backward(
    parts: Tensors, bounds: Bounds, longest: Longest, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    causal, device = window is not None, parts[0].device
    state, unused = torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)
    flash = torch.ops.aten._flash_attention_backward
    with _repeatable():
        return flash(*parts, *bounds, *longest, 0.0, causal, state, unused, scale=scale, **_window(window))


@contextmanager
def _repeatable() -> Iterator[None]:
    """FlashAttention adds up the queries' gradients in a fixed order; torch has one switch for all such algorithms."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # else every tensor is filled before it is written
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before, warn_only=warns)


# --- padded, a few segments at a time ---------------------------------------------------------------------------------


def by_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int = FULL) -> Tensor:
    """The same output [T, H, D], in any dtype and on any device."""
    q_HTD, k_HTD, v_HTD = (_by_head(each, q.shape[1]) for each in (q, k, v))
    out_HTD = torch.empty_like(q_HTD)
    for few in _some(segments, q, window):
        weights = few.weights(few.queries(q_HTD), few.keys(k_HTD), scale)
        few.put(out_HTD, weights @ few.keys(v_HTD))
    return out_HTD.transpose(0, 1).to(q.dtype).contiguous()


def _by_segments_backward(
    parts: Tensors, segments: Segments, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
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
