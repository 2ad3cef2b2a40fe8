"""Weights without values, on which a model's loader is recorded, and where the bytes of what it copies really lie.

A recording knows the trainer's tensors by their names, shapes and strides alone. So it holds for every slot, and for
slots of several ranks, each of which has some rows of every tensor: a source that reaches over the border between two
ranks is cut there.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from transfer.agreement.manifest import Manifest
from transfer.backends.base import Staged
from transfer.memory.regions import views_of
from transfer.memory.rows import Placed, Rows

NORESERVE = 0x4000  # MAP_NORESERVE of Linux: no memory is set aside for pages that are never written


@dataclass(frozen=True, slots=True)
class Copy:
    """A stretch of a parameter, and the staged one of equal shape that belongs there.

    `place`: where the source begins in the slot, or in the slots of all ranks, bytes.
    """

    target: torch.Tensor
    source: torch.Tensor
    place: int


class Described:
    """The tensors of `manifest` in memory that nobody has written, or pays for: pages that are zero when read."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        block = torch.frombuffer(mmap.mmap(-1, max(1, manifest.nbytes), flags=flags), dtype=torch.uint8)
        self.tensors = views_of(block, manifest)
        self._begin = block.data_ptr()
        self._offsets = [entry.offset for entry in manifest.entries]

    def copies(self, target: torch.Tensor, source: torch.Tensor, staged: Staged) -> Iterator[Copy]:
        """The copy of a part of these tensors as copies from where its bytes are staged."""
        if not source.numel():
            return
        at = source.data_ptr() - self._begin
        entry = self.manifest.entries[bisect_right(self._offsets, at) - 1]
        if entry.nbytes == 0:  # shares its offset with the one before
            entry = next(each for each in self.manifest.entries if each.offset == entry.offset and each.nbytes)
        parts = parts_at(staged[entry.name], entry.offset)
        begins = [begin for begin, _, _ in parts]
        for rows, cut, first in _cut(target, source, at - entry.offset, begins):
            begin, part, place = parts[bisect_right(begins, first) - 1]
            yield Copy(rows, _moved(cut, part, first - begin), place + first - begin)


def parts_at(staged: Placed, offset: int) -> list[tuple[int, torch.Tensor, int]]:
    """The parts of a tensor: where each begins in it, and in the slot, or slots, bytes."""
    if not isinstance(staged, Rows):
        return [(0, staged, offset)]
    begins = accumulate((part.nbytes for part in staged.parts), initial=0)
    return list(zip(begins, staged.parts, staged.places, strict=False))


def _cut(
    target: torch.Tensor, source: torch.Tensor, first: int, begins: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Both, cut so that no piece of the source, whose first byte is `first`, reaches over one of `begins`."""
    reach = sum((size - 1) * step for size, step in zip(source.shape, source.stride(), strict=True))
    last = first + reach * source.itemsize
    border = next((begin for begin in begins if first < begin <= last), None)
    if border is None:
        yield target, source, first
        return
    dim = max((dim for dim in range(source.dim()) if source.shape[dim] > 1), key=source.stride)
    step = source.stride(dim) * source.itemsize
    crossing = (border - first) // step  # the one row that may reach over it
    for start, end in ((0, crossing), (crossing, crossing + 1), (crossing + 1, source.shape[dim])):
        end = min(end, source.shape[dim])
        if start < end:
            rows, piece = target.narrow(dim, start, end - start), source.narrow(dim, start, end - start)
            yield from _cut(rows, piece, first + start * step, begins)


def _moved(like: torch.Tensor, part: torch.Tensor, at: int) -> torch.Tensor:
    """What lies in `part` from byte `at` on as `like` lies in the tensor that it is cut from."""
    flat = part.reshape(-1).view(torch.uint8).view(like.dtype)
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset() + at // like.itemsize)
