"""Tensors concatenated into large buffers, and taken apart again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from transfer.agreement.manifest import Entry
from transfer.memory.sums import as_bytes

BUFFER_BYTES = 2**30  # as vLLM's packed mode has it


def buckets(entries: Sequence[Entry], nbytes: int = BUFFER_BYTES) -> list[list[Entry]]:
    """The entries in groups of at most `nbytes`; a larger tensor is a group of its own."""
    groups: list[list[Entry]] = []
    filled = 0
    for entry in entries:
        if not groups or filled + entry.nbytes > nbytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.nbytes
    return groups


def packed(weights: Mapping[str, torch.Tensor], bucket: Sequence[Entry]) -> torch.Tensor:
    """The bytes of these entries, one after the other, in a new buffer."""
    return torch.cat([as_bytes(weights[entry.name]) for entry in bucket])


def unpack(buffer: torch.Tensor, weights: Mapping[str, torch.Tensor], bucket: Sequence[Entry]) -> None:
    """Copy what `packed` made into the weights."""
    for entry, piece in zip(bucket, buffer.split([entry.nbytes for entry in bucket]), strict=True):
        as_bytes(weights[entry.name]).copy_(piece)
