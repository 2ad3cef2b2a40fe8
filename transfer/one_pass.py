"""GPU weights in one pass over memory: copied or cast, their digest summed, values that are not finite found.

One launch of one kernel (one_pass.cu, compiled by NVRTC when it is first needed) works through a table of pieces, which
is made once for tensors that stay where they are. Neighbours in memory on both sides become one range first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transfer.digest import offsets_of, sums_digest
from transfer.manifest import ALIGNMENT

LOG = logging.getLogger(__name__)
PIECE = 2**17  # bytes that one block of threads copies at a time
THREADS = 512
BLOCKS_PER_SM = 2
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


class OnePass:
    """Copies `sources` to `targets`, tensor by tensor, or only reads them, on one GPU; both must stay where they are.

    `padded`: both sides lie in slots, whose gaps between tensors are zero and may be copied, too. `mapped`: the sources
    are another GPU's memory, opened by this one, whatever device torch takes them for.
    """

    def __init__(
        self,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor] | None,
        device: torch.device,
        padded: bool = False,
        mapped: bool = False,
    ) -> None:
        self._device = device
        self._places = [_place(source) for source in sources]
        written = sources if targets is None else targets
        pairs = list(zip(sources, written, strict=True))
        direct = [
            s.is_contiguous() and (mapped or s.device == device) and (s.dtype == t.dtype or (s.dtype, t.dtype) in CASTS)
            for s, t in pairs
        ]
        self._first = [(s, t) for (s, t), fits in zip(pairs, direct, strict=True) if not fits]  # by torch, then read
        if targets is None and self._first:
            raise ValueError(f"only contiguous tensors on {device} can be read where they lie")
        ranges = [
            _range(s, t if targets is not None else None, offset) if fits else _range(t, None, offset)
            for (s, t), fits, offset in zip(pairs, direct, offsets_of(written), strict=True)
        ]
        self.ranges = _merged(ranges, ALIGNMENT if padded else 1)
        self.table = torch.from_numpy(_pieces(self.ranges)).to(device)
        self._results = torch.zeros(3, dtype=torch.int64, device=device)
        self._targets = targets  # the kernel has their addresses; those of the sources are whoever's calls `run`

    def fits(self, sources: Iterable[torch.Tensor]) -> bool:
        """Whether these are the tensors that this pass reads, or others in the same places."""
        return [_place(source) for source in sources] == self._places

    @torch.no_grad()
    def run(self) -> tuple[str, bool]:
        """The digest of the targets, and whether all values are finite; waits until the bytes are there."""
        for source, target in self._first:
            target.copy_(source)
        with torch.cuda.device(self._device):
            self._results.zero_()
            if len(self.table):
                blocks = min(len(self.table), BLOCKS_PER_SM * _multiprocessors(self._device))
                arguments = [self.table, len(self.table), self._results]
                _kernel(self._device)((blocks, 1, 1), (THREADS, 1, 1), arguments)
            first, second, bad = self._results.tolist()
        return sums_digest(first, second), not bad


def addresses(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Where the tensors begin."""
    return list(map(torch.Tensor.data_ptr, tensors))


@cache
def available(device: torch.device) -> bool:
    """Whether the kernel can be compiled for this GPU; False where torch comes without NVRTC."""
    if device.type != "cuda":
        return False
    try:
        _kernel(device)
    except (RuntimeError, OSError, AttributeError, ImportError) as error:
        LOG.warning("weights on %s are copied by torch, which takes longer: %s", device, str(error).splitlines()[0])
        return False
    return True


def _place(tensor: torch.Tensor) -> Hashable:
    """All that tells where, and in which order, the bytes of a tensor lie."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


Range = tuple[int, int, int, int, int, int]  # source, target, offset, bytes, kind, cast


def _range(source: torch.Tensor, target: torch.Tensor | None, offset: int) -> Range:
    written = source if target is None else target
    cast = CASTS.get((source.dtype, written.dtype), 0)
    place = 0 if target is None else target.data_ptr()
    return source.data_ptr(), place, offset, written.nbytes, KINDS.get(written.dtype, 0), cast


def _merged(ranges: list[Range], gap: int) -> list[Range]:
    """Neighbours joined: equally far apart in source, target and digest, with less than `gap` bytes in between."""
    merged: list[Range] = []
    for source, target, offset, nbytes, kind, cast in sorted(r for r in ranges if r[3]):
        if merged:
            s, t, o, n, k, c = merged[-1]
            step = source - s
            together = target - t == step if target else not t
            if together and offset - o == step and 0 <= step - n < gap and (kind, cast) == (k, c) == (kind, 0):
                merged[-1] = (s, t, o, step + nbytes, k, c)
                continue
        merged.append((source, target, offset, nbytes, kind, cast))
    return merged


def _pieces(ranges: list[Range]) -> np.ndarray:
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


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _kernel(device: torch.device) -> Callable[..., Any]:
    source = Path(__file__).with_name("one_pass.cu").read_text()
    with torch.cuda.device(device):
        return torch.cuda._compile_kernel(source, "one_pass")
