"""Attention of packed rows (packing.py), in place of a transformers model's own.

On a GPU, in half precision, it is FlashAttention 2 by lengths (torch's own kernels): one call in which every segment
sees itself, and, where prompts are shared, one in which the responses of a prompt see it whole. Two softmaxes over
disjoint keys are joined by their log-sum-exps, and the gradient of each part follows from the joint output and the
joint log-sum-exp, as in ring attention (arXiv:2310.01889). Elsewhere it is plain products, segment by segment.

Both are one operator for torch.compile, which does not look into it.

Shapes: T tokens, H heads, K key/value heads, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from rlhf.learning.packing import Segments

NAME = "rlhf_packed"
LARGEST_HEAD = 256  # numbers, a multiple of 8: of FlashAttention 2
FULL = -1  # no window
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
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise Unsupported(f"{type(model).__name__} has layers of {', '.join(other)}, which know no packed rows")
    window = getattr(config, "sliding_window", None)
    slides = getattr(config, "use_sliding_window", True) and "sliding_attention" in kinds
    return int(window) if window and slides else None


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if options.get(name) is not None:
            raise Unsupported(f"its attention has {name}, which packed attention does not compute")
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
    """The output [T, H, D] for q [T, H, D] and k, v [T, K, D]; by FlashAttention also the log-sum-exps [H, T].

    `segments` are the fields of Segments.
    """
    who = Segments(*segments)
    if flashes(q):
        return _flash((q, k, v), who, scale, window)
    return by_segments(q, k, v, who, scale, window), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


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


# --- segment by segment -----------------------------------------------------------------------------------------------


def by_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int = FULL) -> Tensor:
    """The same output [T, H, D], in any dtype and on any device."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for own, seen in _seen(segments, q.device):
        weights_HQK = _weights(q[own], _heads(k[seen], q), scale, window)
        out[own] = (weights_HQK @ _heads(v[seen], q)).transpose(0, 1).to(q.dtype)
    return out


def _by_segments_backward(
    parts: Tensors, segments: Segments, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, q, k, v = parts
    gq, gk, gv = (torch.zeros(each.shape, dtype=torch.float32, device=each.device) for each in (q, k, v))
    for own, seen in _seen(segments, q.device):
        keys_HKD, values_HKD, of_out_HQD = _heads(k[seen], q), _heads(v[seen], q), gradient[own].transpose(0, 1).float()
        weights_HQK = _weights(q[own], keys_HKD, scale, window)
        of_weights_HQK = of_out_HQD @ values_HKD.transpose(1, 2)
        of_scores_HQK = (
            weights_HQK * (of_weights_HQK - (weights_HQK * of_weights_HQK).sum(dim=-1, keepdim=True)) * scale
        )
        gq[own] = (of_scores_HQK @ keys_HKD).transpose(0, 1)
        gk.index_add_(0, seen, _shared_heads(of_scores_HQK.transpose(1, 2) @ q[own].transpose(0, 1).float(), k))
        gv.index_add_(0, seen, _shared_heads(weights_HQK.transpose(1, 2) @ of_out_HQD, v))
    return gq.to(q.dtype), gk.to(k.dtype), gv.to(v.dtype)


def _seen(segments: Segments, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Each segment's own places, and those that it may see: its prompt's, and its own."""
    bounds, prompts, groups = (each.tolist() for each in (segments.bounds, segments.prompts, segments.groups))
    shared, prompt = int(segments.sizes[0]), 0
    for begin, end in pairwise(bounds):
        own = torch.arange(begin, end, device=device)
        if shared and begin >= shared:
            while groups[prompt + 1] <= begin - shared:
                prompt += 1
            own = torch.cat([torch.arange(prompts[prompt], prompts[prompt + 1], device=device), own])
        yield slice(begin, end), own


def _weights(q_QHD: Tensor, keys_HKD: Tensor, scale: float, window: int) -> Tensor:
    """softmax(q k' scale) [H, Q, K] in fp32; the queries are the last of the positions of the keys."""
    places = torch.arange(keys_HKD.shape[1], device=q_QHD.device)
    distance = places[len(places) - len(q_QHD) :, None] - places
    hidden = (distance < 0) | (distance >= window) if window != FULL else distance < 0
    scores_HQK = q_QHD.transpose(0, 1).float() @ keys_HKD.transpose(1, 2) * scale
    return scores_HQK.masked_fill(hidden, -torch.inf).softmax(dim=-1)


def _heads(each_KD: Tensor, q: Tensor) -> Tensor:
    """Keys or values [l, K, D] for each of the query's heads, [H, l, D], in fp32."""
    return each_KD.transpose(0, 1).float().repeat_interleave(q.shape[1] // each_KD.shape[1], dim=0)


def _shared_heads(each_HlD: Tensor, like: Tensor) -> Tensor:
    """The inverse for gradients: [H, l, D], summed, as [l, K, D]."""
    return each_HlD.view(like.shape[1], -1, *each_HlD.shape[1:]).sum(dim=1).transpose(0, 1)
