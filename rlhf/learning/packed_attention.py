"""Attention of packed rows (packing.py), in place of a transformers model's own.

On a GPU, in half precision, it is FlashAttention 2 by lengths (flash_attention.py); elsewhere segments are padded and
multiplied (padded_attention.py). Both are one operator for torch.compile, which does not look into it.

Shapes: T tokens, H heads, K key/value heads, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from rlhf.learning import flash_attention, padded_attention
from rlhf.learning.packing import FULL, Segments

NAME = "rlhf_packed"
SLIDING = "sliding_attention"  # a layer's type in a transformers configuration
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


# --- the operator -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("rlhf::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Tensor], scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """The output [T, H, D] for q [T, H, D] and k, v [T, K, D]; by FlashAttention also the log-sum-exps [H, T], else 0.

    `segments` are the fields of Segments.
    """
    who = Segments(*segments)
    if flash_attention.takes(q):
        return flash_attention.forward((q, k, v), who, scale, window)
    nothing = q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)
    return padded_attention.forward(q, k, v, who, scale, window), nothing


@packed_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("rlhf::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    parts: Sequence[Tensor], segments: Sequence[Tensor], scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`parts`: the gradient of the output, q, k, v, the output, its log-sum-exps."""
    if flash_attention.takes(parts[1]):
        return flash_attention.backward(tuple(parts), Segments(*segments), scale, window)
    return padded_attention.backward(tuple(parts[:4]), Segments(*segments), scale, window)


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
