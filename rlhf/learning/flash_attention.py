"""Attention of packed rows by FlashAttention 2, torch's own kernels, on a GPU and in half precision.

One call by lengths in which every segment sees itself, and, where prompts are shared, one in which the responses of a
prompt see it whole. Two softmaxes over disjoint keys are joined by their log-sum-exps, and the gradient of each part
follows from the joint output and the joint log-sum-exp, as in ring attention (arXiv:2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf.learning.packing import FULL, Segments

LARGEST_HEAD = 256  # numbers, a multiple of 8

Tensors = tuple[Tensor, ...]
Bounds = tuple[Tensor, Tensor]  # of queries and of keys
Longest = tuple[int, int]


def takes(q_THD: Tensor) -> bool:
    """Whether FlashAttention takes these queries."""
    size = q_THD.shape[-1]
    return q_THD.is_cuda and q_THD.dtype in (torch.bfloat16, torch.float16) and size <= LARGEST_HEAD and not size % 8


def forward(qkv: Tensors, segments: Segments, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """The output and its log-sum-exps [H, T]: everybody's own segment, then the responses' prompts, joined."""
    q, k, v = qkv
    shared, longest, longest_prompt, longest_group = segments.sizes.tolist()
    own = segments.bounds, segments.bounds
    out, lse = _part(qkv, own, (longest, longest), scale, window if window < longest else FULL)
    if shared and longest_group:
        parts, theirs_are = (q[shared:], k[:shared], v[:shared]), (segments.groups, segments.prompts)
        theirs, theirs_lse = _part(parts, theirs_are, (longest_group, longest_prompt), scale, None)
        both = torch.logaddexp(lse[:, shared:], theirs_lse)
        share = (theirs_lse - both).exp().T[..., None]
        out[shared:] = out[shared:].float().lerp_(theirs.float(), share)
        lse[:, shared:] = both
    return out, lse


def backward(parts: Tensors, segments: Segments, scale: float, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, the same in every run; `parts`: the output's, q, k, v, the output, log-sum-exps."""
    gradient, q, k, v, out, lse = parts
    shared, longest, longest_prompt, longest_group = segments.sizes.tolist()
    own = segments.bounds, segments.bounds
    gq, gk, gv = _part_backward(parts, own, (longest, longest), scale, window if window < longest else FULL)
    if shared and longest_group:
        rest = gradient[shared:], q[shared:], k[:shared], v[:shared], out[shared:], lse[:, shared:].contiguous()
        bounds = segments.groups, segments.prompts
        tq, tk, tv = _part_backward(rest, bounds, (longest_group, longest_prompt), scale, None)
        gq[shared:] += tq
        gk[:shared] += tk
        gv[:shared] += tv
    return gq, gk, gv


def _window(window: int | None) -> dict[str, int]:
    """A query's `window` newest keys; FULL: all before it. None: all keys, as of another sequence."""
    return {} if window is None or window == FULL else {"window_size_left": window - 1, "window_size_right": 0}


def _part(qkv: Tensors, bounds: Bounds, longest: Longest, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    causal = window is not None
    flash = torch.ops.aten._flash_attention_forward
    out, lse, *_ = flash(*qkv, *bounds, *longest, 0.0, causal, False, scale=scale, **_window(window))
    assert lse.shape == (out.shape[1], out.shape[0]), "a log-sum-exp a head and a token"
    return out, lse


def _part_backward(
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
