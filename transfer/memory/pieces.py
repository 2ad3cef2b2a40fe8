"""What there is to copy, or only to read: ranges of memory, and the table of pieces that one_pass.cu works through.

A range is (source, target or 0, offset in the digest's slot, bytes in the target, kind of its values, cast).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

PIECE = 2**17  # bytes that one block of threads copies at a time
SHORT = 2**13  # bytes of a piece up to which a warp alone copies it
WARP = 32  # threads
KINDS = {  # what the kernel calls the dtypes whose values may be not finite
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float32: 3,
    torch.float64: 4,
    torch.float8_e5m2: 5,
    torch.float8_e4m3fn: 6,
    torch.complex64: 3,
    torch.complex128: 4,
}
CASTS = {(torch.float32, torch.bfloat16): 1, (torch.float32, torch.float16): 2}
WORD = 8  # bytes that the digest takes at a time
LEAST_STRETCH = 512  # bytes; many shorter ones are copied by torch in less time
Range = tuple[int, int, int, int, int, int]


def range_of(source: torch.Tensor, target: torch.Tensor | None, offset: int) -> Range:
    """A contiguous tensor that is copied to `target`, or only read."""
    written = source if target is None else target
    cast = CASTS.get((source.dtype, written.dtype), 0)
    place = 0 if target is None else target.data_ptr()
    return source.data_ptr(), place, offset, written.nbytes, KINDS.get(written.dtype, 0), cast


def stretch_of(source: torch.Tensor, target: torch.Tensor) -> int:
    """Elements in a row that lie without gaps on both sides, from the last dimension on."""
    step = 1
    for size, there, here in zip(source.shape[::-1], source.stride()[::-1], target.stride()[::-1], strict=True):
        if size > 1 and (there, here) != (step, step):
            break
        step *= size
    return step


def is_direct(source: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the kernel can copy this, or read it if both are one, as far as layout and dtypes go."""
    known = source.dtype == target.dtype or (source.dtype, target.dtype) in CASTS
    whole = source.is_contiguous() and target.is_contiguous()
    nbytes = 0 if whole else stretch_of(source, target) * target.itemsize
    return known and (whole or (nbytes >= LEAST_STRETCH and nbytes % WORD == 0))


def ranges_of(source: torch.Tensor, target: torch.Tensor | None, offset: int) -> list[Range]:
    """A tensor that is copied to `target`, or only read: a range for each stretch without gaps."""
    if target is None or (source.is_contiguous() and target.is_contiguous()):
        return [range_of(source, target, offset)]
    if not source.numel():
        return []
    place, there, _, _, kind, cast = range_of(source, target, offset)
    stretch = stretch_of(source, target)
    starts, ends = _starts(source, stretch), _starts(target, stretch)
    nbytes = stretch * target.itemsize
    pairs = enumerate(zip(starts, ends, strict=True))
    return [(place + s, there + t, offset + index * nbytes, nbytes, kind, cast) for index, (s, t) in pairs]


def _starts(tensor: torch.Tensor, stretch: int) -> list[int]:
    """Where the stretches of so many elements begin, bytes from the first on."""
    at = np.zeros(1, np.int64)
    left = tensor.numel() // stretch
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if left == 1:
            break
        at = (at[:, None] + np.arange(size, dtype=np.int64) * (stride * tensor.itemsize)).reshape(-1)
        left //= size
    found: list[int] = at.tolist()
    return found


def merged(ranges: list[Range], gap: int) -> list[Range]:
    """Neighbours joined: equally far apart in source, target and digest, with less than `gap` bytes in between."""
    joined: list[Range] = []
    for source, target, offset, nbytes, kind, cast in sorted(r for r in ranges if r[3]):
        if joined:
            s, t, o, n, k, c = joined[-1]
            step = source - s
            together = target - t == step if target else not t
            if together and offset - o == step and 0 <= step - n < gap and (kind, cast) == (k, c) == (kind, 0):
                joined[-1] = (s, t, o, step + nbytes, k, c)
                continue
        joined.append((source, target, offset, nbytes, kind, cast))
    return joined


@dataclass(frozen=True, slots=True)
class Table:
    """The kernel's table: pieces [n, 4] int64, the first `longs` for a block of threads each, the others for a warp."""

    pieces: torch.Tensor
    longs: int

    @classmethod
    def of(cls, ranges: list[Range], device: torch.device, mixed: bool = False) -> Table:
        """All that these ranges are cut into, on `device`; `mixed` evenly, from wherever they come."""
        rows, sizes = _rows(ranges)
        if mixed:
            order = np.random.default_rng(0).permutation(len(rows))
            rows, sizes = rows[order], sizes[order]
        short = sizes <= SHORT
        rows = rows[np.argsort(short, kind="stable")]
        return cls(torch.from_numpy(rows).to(device), int(np.count_nonzero(~short)))

    def __len__(self) -> int:
        return len(self.pieces)

    def blocks(self, threads: int, most: int) -> int:
        """How many blocks of so many threads have something to do, but not more than `most`."""
        short = len(self) - self.longs
        return min(most, max(self.longs, -(-short * WARP // threads)))


def _rows(ranges: list[Range]) -> tuple[np.ndarray, np.ndarray]:
    """The table's rows, and the bytes of each."""
    if not ranges:
        return np.zeros((0, 4), np.int64), np.zeros(0, np.int64)
    source, target, offset, nbytes, kind, cast = (np.array(column, np.uint64) for column in zip(*ranges, strict=True))
    counts = -(-nbytes.astype(np.int64) // PIECE)
    which = np.repeat(np.arange(len(ranges)), counts)
    start = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.uint64) * np.uint64(PIECE)
    size = np.minimum(nbytes[which] - start, np.uint64(PIECE))
    width = np.where(cast[which] > 0, np.uint64(2), np.uint64(1))  # bytes read for one written
    table = np.empty((len(which), 4), np.uint64)
    table[:, 0] = source[which] + start * width
    table[:, 1] = np.where(target[which] > 0, target[which] + start, np.uint64(0))
    table[:, 2] = (offset[which] + start) // np.uint64(8)
    table[:, 3] = size | kind[which] << np.uint64(32) | cast[which] << np.uint64(40)
    return table.view(np.int64), size.astype(np.int64)
