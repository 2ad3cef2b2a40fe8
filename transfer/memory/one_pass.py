"""GPU weights in one pass over memory: copied or cast, their digest summed, values that are not finite found.

One launch of one kernel (one_pass.cu, compiled by NVRTC when it is first needed) works through a table of pieces, which
is made once for tensors that stay where they are. Neighbours in memory on both sides become one range first.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from transfer.agreement.manifest import ALIGNMENT
from transfer.memory.far_copy import FarCopy, is_far
from transfer.memory.garbage import uncollected
from transfer.memory.pieces import Table, is_direct, merged, ranges_of
from transfer.memory.sums import offsets_of, sums_digest

LOG = logging.getLogger(__name__)
THREADS = 512
BLOCKS_PER_SM = 2
PLACES: tuple[Callable[[torch.Tensor], Any], ...] = (  # all that tells where, and in which order, a tensor's bytes lie
    torch.Tensor.data_ptr,
    operator.attrgetter("dtype"),
    operator.attrgetter("shape"),
    torch.Tensor.stride,
)


class Lying(Enum):
    """Where what a pass reads lies."""

    anywhere = "anywhere"
    slot = "slot"  # as its targets do, in a slot: the gaps between tensors are zero, and may be copied, too
    slots = "slots"  # in slots of several ranks: memory of this GPU and of others is best read at the same time


class OnePass:
    """Copies `sources` to `targets`, tensor by tensor, or only reads them, on one GPU; both must stay where they are.

    `lying`: where the sources are. `owner`: they are memory of this GPU, opened here, whatever device torch takes them
    for. `offsets`: where each pair stands in the digest, if not one after the other.
    """

    def __init__(
        self,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor] | None,
        device: torch.device,
        lying: Lying = Lying.anywhere,
        owner: torch.device | None = None,
        offsets: Sequence[int] | None = None,
    ) -> None:
        self._device = device = _indexed(device)
        self._places = [list(map(place, sources)) for place in PLACES]
        written = sources if targets is None else targets
        pairs = list(zip(sources, written, strict=True))
        here = (owner, device)  # what the kernel can read
        reads = targets is None
        direct = [(owner or s.device) in here and (s.is_contiguous() if reads else is_direct(s, t)) for s, t in pairs]
        self._first = [(s, t) for (s, t), fits in zip(pairs, direct, strict=True) if not fits]  # by torch, then read
        if reads and self._first:
            raise ValueError(f"only contiguous tensors on {device} can be read where they lie")
        ranges = [
            each
            for (s, t), fits, offset in zip(pairs, direct, offsets or offsets_of(written), strict=True)
            for each in ranges_of(s if fits else t, t if fits and not reads else None, offset)
        ]
        self.ranges = merged(ranges, ALIGNMENT if lying is Lying.slot else 1)
        others = owner not in (None, device)
        far = [each for each in self.ranges if others and is_far(each)]
        near = [each for each in self.ranges if not (others and is_far(each))]
        self._far = FarCopy(far, device) if far else None
        self.table = Table.of(near, device, mixed=lying is Lying.slots)
        self._results = torch.zeros(3, dtype=torch.int64, device=device)
        self._targets = targets  # the kernel has their addresses; those of the sources are whoever's calls `run`
        self._graphs: dict[bool, Recorded] = {}  # by whether there is a digest

    def fits(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether these are the tensors that this pass reads, or others in the same places."""
        same = (map(operator.eq, map(place, sources), known) for place, known in zip(PLACES, self._places, strict=True))
        return len(sources) == len(self._places[0]) and all(map(all, same))

    def run(self, with_digest: bool = True) -> tuple[str | None, bool]:
        """The digest of the targets, and whether all values are finite; waits until the bytes are there."""
        return self.start(with_digest)()

    @torch.no_grad()
    def start(self, with_digest: bool = True) -> Callable[[], tuple[str | None, bool]]:
        """Queue the work; what is returned waits for it, and gives what `run` does."""
        for source, target in self._first:
            target.copy_(source)
        with torch.cuda.device(self._device):
            if with_digest not in self._graphs:
                self._graphs[with_digest] = Recorded(partial(self._queue, with_digest), self._results)
            self._graphs[with_digest].start()
        return partial(self._wait, with_digest)

    def _wait(self, with_digest: bool) -> tuple[str | None, bool]:
        with torch.cuda.device(self._device):
            first, second, bad = self._graphs[with_digest].wait()
        return sums_digest(first, second) if with_digest else None, not bad

    def _queue(self, with_digest: bool) -> None:
        """All the work, on the current stream."""
        self._results.zero_()
        self._launch(with_digest, self.table)
        if self._far is not None:  # with the digest, wanted or not: reading any faster keeps the copies from memory
            self._far.run(partial(self._launch, True))

    @property
    def plan(self) -> str:
        """How the bytes are moved, in words."""
        far = 0 if self._far is None else len(self._far.chunks)
        engine = f", by the copy engine in {far} chunks, each then read by the kernel" if far else ""
        kernel = ", by the kernel" if len(self.table) else ""
        torch_first = f", {len(self._first)} by torch before" if self._first else ""
        return f"{len(self._places[0])} tensors in {len(self.ranges)} ranges{engine}{kernel}{torch_first}"

    def digest(self) -> str:
        """The digest of the targets, or of what is only read."""
        found, _ = self.run()
        assert found is not None
        return found

    def _launch(self, with_digest: bool, table: Table) -> None:
        if len(table):
            blocks = table.blocks(THREADS, BLOCKS_PER_SM * _multiprocessors(self._device))
            arguments = [table.pieces, len(table), table.longs, int(with_digest), self._results]
            _kernel(self._device)((blocks, 1, 1), (THREADS, 1, 1), arguments)


class Recorded:
    """Work on the GPU as a CUDA graph, which the host starts with one call: single launches take 0.1 ms and more."""

    def __init__(self, queue: Callable[[], None], results: torch.Tensor) -> None:
        queue()  # whatever CUDA loads at the first use must not be recorded
        self._results = results.to("cpu").pin_memory()
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), uncollected():  # to free GPU memory would end what is being recorded
            self._graph.capture_begin(capture_error_mode="thread_local")  # other threads may be sampling
            try:
                queue()
                self._results.copy_(results, non_blocking=True)
            finally:
                self._graph.capture_end()

    def start(self) -> None:
        """Queue it on the current stream."""
        self._graph.replay()

    def wait(self) -> list[int]:
        """The results, once it is done."""
        torch.cuda.current_stream().synchronize()
        found: list[int] = self._results.tolist()
        return found


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


def _indexed(device: torch.device) -> torch.device:
    """The same with its number, as tensors say it."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _kernel(device: torch.device) -> Callable[..., Any]:
    source = Path(__file__).with_name("one_pass.cu").read_text(encoding="utf-8")
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # a thread that asks CUDA for the first time has no context yet
        return torch.cuda._compile_kernel(source, "one_pass")
