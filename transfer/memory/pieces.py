"""What there is to copy, or only to read: ranges of memory, and the table of pieces that one_pass.cu works through.

A range is (source, target or 0, offset in the digest's slot, bytes in the target, kind of its values, cast).
"""

from __future__ import annotations

import numpy as np
import torch

PIECE = 2**17  # bytes that one block of threads copies at a time
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
Range = tuple[int, int, int, int, int, int]


def range_of(source: torch.Tensor, target: torch.Tensor | None, offset: int) -> Range:
    """A contiguous tensor that is copied to `target`, or only read."""
    written = source if target is None else target
    cast = CASTS.get((source.dtype, written.dtype), 0)
    place = 0 if target is None else target.data_ptr()
    return source.data_ptr(), place, offset, written.nbytes, KINDS.get(written.dtype, 0), cast


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


def table_of(ranges: list[Range]) -> np.ndarray:
    """The kernel's table, [pieces, 4] int64."""
    if not ranges:
        return np.zeros((0, 4), np.int64)
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
    return table.view(np.int64)
