"""Weights that anybody can make again: all bytes follow from which trainer pushes, and which of its pushes it is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from transfer.agreement.manifest import Manifest
from transfer.memory.digest import digest_of

SIZES = {"small": 256 * 2**10, "big": 16 * 2**20}  # bytes, about
COUNT = 40  # tensors


def zeros(size: str) -> dict[str, torch.Tensor]:
    """Tensors of every kind, before the first `fill`."""
    elements = SIZES[size] // COUNT // 4
    weights = {f"layer.{index:02d}": torch.zeros(elements + index % 3) for index in range(COUNT - 3)}
    half = torch.zeros(2 * elements + 1, dtype=torch.bfloat16)
    return weights | {"half": half, "scale": torch.zeros(()), "stamp": torch.zeros(3, dtype=torch.int64)}


def fill(weights: Mapping[str, torch.Tensor], trainer: int, push: int) -> None:
    """Write the content of one push in place; no tensor is like that of any other push."""
    number = (trainer * 7919 + push * 31) % 2**16
    for index, (name, tensor) in enumerate(sorted(weights.items())):
        if name != "stamp":
            torch.add(pattern(tensor.numel()).view(tensor.shape), number + index, out=tensor)
    weights["stamp"].copy_(torch.tensor([trainer, push, number]))


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """What a worker that holds these weights answers."""
    return digest_of(weights[entry.name] for entry in Manifest.of(weights).entries)


@cache
def pattern(elements: int) -> torch.Tensor:
    """Numbers in [0, 1) that are no two neighbours' equal."""
    return torch.arange(elements, dtype=torch.float32).mul_(0.6180339887).frac_()
