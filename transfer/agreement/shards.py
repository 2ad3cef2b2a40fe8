"""Which rows of each tensor a rank of the trainer holds: it follows from the manifest, so that nobody has to say it.

Dim 0 is cut by torch.chunk's rule, as FSDP2 cuts it: all ranks but the last ones have equally many rows, the last may
have fewer, or none. A tensor that has no dim 0, or is not sharded at all, belongs to the first rank.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transfer.agreement.manifest import Entry, Manifest
from transfer.agreement.wire import is_int

MAX_RANKS = 4096


def is_ranks(value: Any) -> bool:
    """Whether a message may say that a trainer has so many."""
    return is_int(value) and 1 <= value <= MAX_RANKS


def is_names(value: Any) -> bool:
    """Whether this is a list of tensors' names."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def rows_of(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """The first row of a tensor with so many that a rank holds, and the one after its last."""
    most = -(-rows // ranks)
    first = min(rows, rank * most)
    return first, min(rows, first + most)


def local(manifest: Manifest, ranks: int, rank: int, whole: Collection[str] = ()) -> Manifest:
    """What one rank holds of each entry, laid out anew; entries named in `whole` are not sharded."""
    return manifest.reshaped(_held(entry, ranks, rank, entry.name in whole) for entry in manifest.entries)


def _held(entry: Entry, ranks: int, rank: int, whole: bool) -> tuple[int, ...]:
    if whole or not entry.shape:
        return entry.shape if rank == 0 else (0, *entry.shape[1:])
    first, end = rows_of(entry.shape[0], ranks, rank)
    return end - first, *entry.shape[1:]
