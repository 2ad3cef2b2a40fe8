"""`rollout.batch_invariant`: what is computed of a row is the same, to the bit, whatever rows are computed beside it.

Kernels choose by shapes. How a matrix product adds up depends on the number of its rows, so that each product with
weights is made of products of BLOCK rows, the last filled up. How attention adds up depends on the width that a row is
padded to, so that this follows from the row's own length. Elementwise kernels treat what is left over at a tensor's end
in another way, so that there are always as many rows as leave nothing over.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

BLOCK = 32  # rows of a matrix product; in a batch there is a multiple of them
PROMPTS = 8  # of which a prefill has a multiple, where its width does not fill vector registers by itself
STEP = 8  # widths of short prompts are multiples of this
ALIGNED = 64  # bytes: products of what begins elsewhere may have other bits


class Here(threading.local):
    """What is so in this thread."""

    blocked = False


HERE = Here()


@contextmanager
def blocked() -> Iterator[None]:
    """Inside it, in this thread, `prepared` models make each product of rows with weights of blocks."""
    before, HERE.blocked = HERE.blocked, True
    try:
        yield
    finally:
        HERE.blocked = before


def prepared(model: torch.nn.Module) -> None:
    """Let the model's modules heed `blocked`; otherwise they compute as ever.

    Bound methods in the place of `forward`: a copy of the model has those of its own modules.
    """
    whole = type(model.get_output_embeddings()).forward is not torch.nn.Linear.forward  # type: ignore[operator]
    for module in model.modules():
        if type(module).forward is torch.nn.Linear.forward:
            module.forward = MethodType(_linear, module)
        elif (whole and module is model) or _multiplies(module):
            module.forward = MethodType(_in_mode(type(module).forward), module)


def released(model: torch.nn.Module) -> None:
    """The model as it was before `prepared`."""
    for module in model.modules():
        if getattr(getattr(module.__dict__.get("forward"), "__func__", None), "of_blocks", False):
            del module.forward


def _multiplies(module: torch.nn.Module) -> bool:
    """Whether the module has matrices of its own, and is none that only looks rows up."""
    matrices = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    return (matrices or hasattr(module, "parametrizations")) and not isinstance(module, torch.nn.Embedding)


def _linear(module: Any, input: torch.Tensor) -> torch.Tensor:
    return (linear if HERE.blocked else F.linear)(input, module.weight, module.bias)


_linear.of_blocks = True  # type: ignore[attr-defined]


@functools.cache
def _in_mode(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)  # with its arguments, which are looked at
    def inside(*args: Any, **kwargs: Any) -> Any:
        with Blocks() if HERE.blocked else nullcontext():
            return forward(*args, **kwargs)

    inside.of_blocks = True  # type: ignore[attr-defined]
    return inside


class Blocks(TorchFunctionMode):
    """Inside it products are made of blocks, whichever way they are called; it costs some microseconds a call."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As torch has it; functions called here are called outside of the mode."""
        return BLOCKED.get(func, func)(*args, **(kwargs or {}))


def in_blocks(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows [R, K] @ weight [K, N], made of products of BLOCK rows."""
    count = len(rows)
    whole = -(-count // BLOCK) * BLOCK
    if whole == 0:
        return rows @ weight
    if whole > count or not rows.is_contiguous() or rows.data_ptr() % ALIGNED:
        filled = rows.new_zeros(whole, rows.shape[1])
        filled[:count] = rows
        rows = filled
    if whole == BLOCK:
        return (rows @ weight)[:count]
    out = rows.new_empty(whole, weight.shape[1])
    for start in range(0, whole, BLOCK):
        torch.mm(rows[start : start + BLOCK], weight, out=out[start : start + BLOCK])
    return out[:count]


def _rows(input: torch.Tensor) -> torch.Tensor:
    return input.reshape(input.shape[:-1].numel(), input.shape[-1])


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As F.linear."""
    out = in_blocks(_rows(input), weight.t())
    if bias is not None:
        out = out + bias
    return out.view(*input.shape[:-1], len(weight))


def addmm(input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, **scales: Any) -> torch.Tensor:
    """As torch.addmm."""
    if scales:
        return torch.addmm(input, mat1, mat2, **scales)
    return in_blocks(mat1, mat2) + input


def matmul(input: torch.Tensor, other: torch.Tensor, **options: Any) -> torch.Tensor:
    """As torch.matmul: what is multiplied by one matrix are rows."""
    if other.dim() != 2 or input.dim() < 2 or options:
        return torch.matmul(input, other, **options)
    return in_blocks(_rows(input), other).view(*input.shape[:-1], other.shape[1])


def grouped_mm(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, **options: Any) -> torch.Tensor:
    """As F.grouped_mm, of rows [R, K] of which each group [start, end) has a matrix of weight [G, K, N]."""
    if input.dim() != 2 or weight.dim() != 3 or any(value is not None for value in options.values()):
        raise ValueError("rollout.batch_invariant=true knows no such grouped product: set it to false")
    out = input.new_zeros(len(input), weight.shape[2])
    start = 0
    for group, end in enumerate(offs.tolist()):
        if end > start:
            out[start:end] = in_blocks(input[start:end], weight[group])
        start = end
    return out


BLOCKED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: linear,
    torch.addmm: addmm,
    torch.mm: matmul,
    torch.matmul: matmul,
    torch.Tensor.mm: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
}
BLOCKED |= {  # not every torch that we take has both
    getattr(module, name): grouped_mm
    for module, name in ((F, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(module, name)
}


def padded_width(length: int, most: int | None) -> int:
    """Positions of a prompt with its padding, `most` at most; one at least is padding, so that there is a mask."""
    step = max(STEP, 2 ** max(0, length.bit_length() - 2))
    width = (length // step + 1) * step
    return width if most is None or width <= most else max(length, most)


def prompts_at_least(width: int) -> int:
    """Of how many prompts of this width a prefill has a multiple."""
    return min(PROMPTS, BLOCK // math.gcd(BLOCK, width))


def filled(places: np.ndarray, step: int) -> np.ndarray:
    """The places, the first repeated until there is a multiple of `step`."""
    return np.concatenate([places, np.repeat(places[:1], -len(places) % step)])
