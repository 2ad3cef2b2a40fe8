"""GPU weights in one pass over memory: copied or cast, their digest summed, values that are not finite found.

One launch of one kernel (one_pass.cu, compiled by NVRTC when it is first needed) works through a table of pieces, which
is made once for tensors that stay where they are. Neighbours in memory on both sides become one range first. The
device's own copies of the ranges, then read once more by the kernel if need be, may be faster: `choose` measures both.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transfer.digest import offsets_of, sums_digest
from transfer.manifest import ALIGNMENT
from transfer.memory import cuda_runtime

THREADS = 512
BLOCKS_PER_SM = 2
SHAPES = {  # bytes that one block of threads copies at a time, 16-byte words that each of its threads has in flight
    "kernel": (2**17, 8),
    "kernel, small pieces": (2**15, 4),
    "kernel, smallest pieces": (2**14, 2),  # neighbouring blocks work on fewer pages of memory
}
RUNS = 3  # to measure a way by
WORTH_BYTES = 2**26  # below that no way is worth the second that a kernel takes to be compiled
MEMCPY_DEFAULT = 4  # cudaMemcpyDefault: the addresses tell the devices
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
    """Copies `sources` to `targets`, tensor by tensor, or only reads them; both must stay where they are.

    `padded`: both sides lie in slots, whose gaps between tensors are zero and may be copied, too.
    """

    def __init__(
        self,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor] | None,
        device: torch.device,
        padded: bool = False,
    ) -> None:
        self._device = device
        self._held = (list(sources), targets)  # the kernel has their addresses
        self._addresses = addresses(sources)
        written = sources if targets is None else targets
        pairs = list(zip(sources, written, strict=True))
        direct = [s.is_contiguous() and (s.dtype == t.dtype or (s.dtype, t.dtype) in CASTS) for s, t in pairs]
        self._first = [(s, t) for (s, t), fits in zip(pairs, direct, strict=True) if not fits]  # by torch, then read
        if targets is None and self._first:
            raise ValueError("only contiguous tensors can be read where they lie")
        ranges = [
            _range(s, t if targets is not None else None, offset) if fits else _range(t, None, offset)
            for (s, t), fits, offset in zip(pairs, direct, offsets_of(written), strict=True)
        ]
        self.ranges = _merged(ranges, ALIGNMENT if padded else 1)
        self._tables: dict[str, torch.Tensor] = {}
        self._results = torch.zeros(3, dtype=torch.int64, device=device)
        self._way: Way = self._by_kernel

    def fits(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether these are the tensors that this pass reads, or others in the same places."""
        return addresses(sources) == self._addresses

    def run(self) -> tuple[str | None, bool]:
        """The digest of the targets, and whether all values are finite; waits until the bytes are there.

        Without a digest nobody has looked at the values.
        """
        return self._way()

    def choose(self, told: bool) -> dict[str, float]:
        """Take the fastest way from now on, by milliseconds; `told`: the digest, or whether values are finite, counts.

        Copies, so that the targets hold what the sources do. Measures nothing where there is little to gain.
        """
        if sum(nbytes for _, _, _, nbytes, *_ in self.ranges) < WORTH_BYTES:
            return {}
        ways: dict[str, Way] = {shape: partial(self._by_kernel, shape) for shape in SHAPES}
        targets = self._held[1]
        if targets is not None and not self._first and not any(cast for *_, cast in self.ranges):
            reader = OnePass(targets, None, self._device) if told else None
            ways["copies"] = partial(self._by_copies, reader)
        measured = {name: _milliseconds(way) for name, way in ways.items()}
        best = min(measured, key=lambda name: measured[name])
        self._way = ways[best]
        self._tables = {shape: table for shape, table in self._tables.items() if shape == best}
        return measured

    @torch.no_grad()
    def _by_kernel(self, shape: str = "kernel") -> tuple[str, bool]:
        for source, target in self._first:
            target.copy_(source)
        with torch.cuda.device(self._device):
            self._launch(shape)
            first, second, bad = self._results.tolist()
        return sums_digest(first, second), not bad

    def _by_copies(self, reader: OnePass | None) -> tuple[str | None, bool]:
        with torch.cuda.device(self._device):
            copy, stream = _memcpy(), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            for source, target, _, nbytes, *_ in self.ranges:
                if copy(target, source, nbytes, MEMCPY_DEFAULT, stream):
                    raise RuntimeError(f"CUDA could not copy {nbytes} bytes")
            if reader is not None:
                return reader._by_kernel()
            torch.cuda.current_stream().synchronize()
        return None, True

    def _launch(self, shape: str) -> None:
        self._results.zero_()
        table = self.table(shape)
        if len(table):
            blocks = min(len(table), BLOCKS_PER_SM * _multiprocessors(self._device))
            kernel = _kernel(self._device, SHAPES[shape][1])
            kernel((blocks, 1, 1), (THREADS, 1, 1), [table, len(table), self._results])

    def table(self, shape: str = "kernel") -> torch.Tensor:
        """What the kernel is given, [pieces, 4] int64 (one_pass.cu)."""
        if shape not in self._tables:
            self._tables[shape] = torch.from_numpy(_pieces(self.ranges, SHAPES[shape][0])).to(self._device)
        return self._tables[shape]


def _milliseconds(way: Callable[[], Any]) -> float:
    """Of the fastest of some runs; the first is not counted."""
    way()
    taken = []
    for _ in range(RUNS):
        began = time.perf_counter()
        way()
        taken.append(1e3 * (time.perf_counter() - began))
    return round(min(taken), 3)


def addresses(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Where the tensors begin."""
    return list(map(torch.Tensor.data_ptr, tensors))


def available(device: torch.device) -> bool:
    """Whether the kernel can be compiled for this GPU; False where torch comes without NVRTC."""
    if device.type != "cuda":
        return False
    try:
        _kernel(device, SHAPES["kernel"][1])
    except (RuntimeError, OSError, AttributeError, ImportError):
        return False
    return True


Way = Callable[[], tuple[str | None, bool]]
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


def _pieces(ranges: list[Range], most: int) -> np.ndarray:
    """The kernel's table, [pieces, 4] int64."""
    if not ranges:
        return np.zeros((0, 4), np.int64)
    source, target, offset, nbytes, kind, cast = (np.array(column, np.uint64) for column in zip(*ranges, strict=True))
    counts = -(-nbytes.astype(np.int64) // most)
    which = np.repeat(np.arange(len(ranges)), counts)
    start = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.uint64) * np.uint64(most)
    size = np.minimum(nbytes[which] - start, np.uint64(most))
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
def _memcpy() -> Any:
    function = cuda_runtime().cudaMemcpyAsync
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    return function


@cache
def _kernel(device: torch.device, unroll: int) -> Callable[..., Any]:
    source = f"#define UNROLL {unroll}\n" + Path(__file__).with_name("one_pass.cu").read_text()
    with torch.cuda.device(device):
        return torch.cuda._compile_kernel(source, "one_pass")
