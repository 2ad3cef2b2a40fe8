"""Large ranges of another GPU's memory: a copy engine fetches them, and the kernel reads each chunk behind it.

Copy engines fill NVLink and PCIe better than a kernel's loads do; reading what has arrived takes a tenth of the time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from transfer.memory.pieces import Range, Table
from transfer.memory.regions import check, cuda_runtime

CHUNK = 2**28  # bytes that are read while the next ones come
LEAST = 2**20  # bytes of a range below which the kernel is as fast
DEFAULT = 4  # cudaMemcpyDefault: the driver knows whose the addresses are


def is_far(piece: Range) -> bool:
    """Whether a range is worth a copy engine, and can have one: as it is, and somewhere."""
    _, target, _, nbytes, _, cast = piece
    return bool(target) and nbytes >= LEAST and not cast


@dataclass(frozen=True, slots=True)
class Chunk:
    """One copy, and the table with which the kernel reads it afterwards."""

    source: int
    target: int
    nbytes: int
    table: Table


class FarCopy:
    """Copies ranges of which `is_far` holds to `device`, again and again."""

    def __init__(self, ranges: Iterable[Range], device: torch.device) -> None:
        self.chunks = [
            Chunk(source + at, target + at, size, Table.of([read], device))
            for source, target, offset, nbytes, kind, _ in ranges
            for at in range(0, nbytes, CHUNK)
            for size in [min(CHUNK, nbytes - at)]
            for read in [(target + at, 0, offset + at, size, kind, 0)]
        ]
        self._reader: torch.cuda.Stream | None = None
        self._arrived: list[torch.cuda.Event] = []

    def run(self, read: Callable[[Table], None]) -> None:
        """Queue all copies on the current stream, and `read(table)` of each chunk once it is there."""
        if self._reader is None:
            self._reader, self._arrived = torch.cuda.Stream(), [torch.cuda.Event() for _ in self.chunks]
        stream = torch.cuda.current_stream()
        queue = ctypes.c_void_p(stream.cuda_stream)
        for chunk, arrived in zip(self.chunks, self._arrived, strict=True):
            target, source = ctypes.c_void_p(chunk.target), ctypes.c_void_p(chunk.source)
            check(cuda_runtime().cudaMemcpyAsync(target, source, ctypes.c_size_t(chunk.nbytes), DEFAULT, queue))
            arrived.record(stream)
        with torch.cuda.stream(self._reader):
            for chunk, arrived in zip(self.chunks, self._arrived, strict=True):
                self._reader.wait_event(arrived)
                read(chunk.table)
        stream.wait_stream(self._reader)
