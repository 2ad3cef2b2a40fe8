"""Which rows each step takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def batches(rows: int, size: int, steps: int, seed: int) -> Iterable[list[int]]:
    """`steps` batches of row numbers: shuffled passes over all rows, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < min(size, rows):
            queue += torch.randperm(rows, generator=generator).tolist()
        yield queue[: min(size, rows)]
        queue = queue[min(size, rows) :]
