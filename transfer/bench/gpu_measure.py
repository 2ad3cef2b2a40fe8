"""Times the ways between GPUs, one receiving process after the other, so that each has the memory for itself.

Before a process starts, the limit is measured anew and its buffers are given back. A way's extra memory is what both
GPUs hold after its first update, less what they held when both sides had their weights and nothing else; of ways that
share a process (`off` comes before `digest`), the later one's includes what the earlier one's has left.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from transfer.bench import gpu_peers, ours
from transfer.bench.gpu import Gpus, Meter
from transfer.bench.lab import Lab, RayHost
from transfer.bench.measure import Bench, Progress, Row
from transfer.bench.shapes import BenchError, Model
from transfer.bench.source import Source
from transfer.bench.ways import BY_TENSOR, CUDA, FLAT, PEERS, Unit, Way, needs_ray

ROUNDS = 20
LIMIT_ROUNDS = 5  # before each receiving process
LIMIT_COPIES = (1, 1)  # of the weights, on the sender's GPU and on the receiver's
NEEDS: Mapping[str, tuple[float, float]] = {  # the same while a way is under way, besides the trainer's weights
    "ipc-arena": (2, 1),
    "ipc-live": (1, 1),
    "one-shot": (0, 2),
    "handle": (0, 1),
    "nccl-by": (0, 1),
    "nccl-packed": (0, 1),
    "nccl": (1, 1),
}
FREED_S = 10.0  # how long the driver may take to give back what an ended process held
SLACK_BYTES = 256 * 2**20  # that may stay: what CUDA loads at its first use


def check_fits(model: Model, gpus: Gpus) -> None:
    """BenchError unless the trainer's weights and the limit's buffers fit beside each other."""
    lack = gpus.lacks(model.nbytes, (1 + LIMIT_COPIES[0], LIMIT_COPIES[1]))
    if lack:
        raise BenchError(f"{model.name} {lack}, before any way is opened: try --scale 0.25")


def ray_for(names: Collection[str], folder: Path) -> RayHost | None:
    """The Ray that these ways need, or None."""
    return RayHost(0, folder, reuses_actors=False) if any(map(needs_ray, names)) else None


class GpuBench(Bench):
    """The rows of one model on GPUs."""

    def __init__(
        self, lab: Lab, gpus: Gpus, meter: Meter, names: Sequence[str], repeats: int, progress: Progress
    ) -> None:
        self._gpus = gpus
        self._meter = meter
        self._beside = 0.0  # the limit's median, seconds
        super().__init__(lab, names, repeats, progress)
        gpus.release()
        self._idle_bytes = gpus.used()

    def run(self, units: Sequence[Unit]) -> None:
        """One after the other."""
        for unit in units:
            name = unit.names[0]
            needed = next(copies for prefix, copies in NEEDS.items() if name.startswith(prefix))
            if lack := self._gpus.lacks(self._lab.nbytes, needed):
                self.fail(unit.names, lack)
                continue
            self._progress(f"{self._lab.name}: the limit, then {', '.join(unit.names)}", always=True)
            with self._or_failed(unit.names):
                self._measure_limit()
                super().run([unit])
            self._wait_for_memory(name)

    def _measure_limit(self) -> None:
        limit = GpuLimit(self._lab.source, self._gpus)
        flat = [limit.flat() for _ in range(LIMIT_ROUNDS)]
        self._beside = statistics.median(flat)
        for row, samples in ((FLAT, flat), (BY_TENSOR, [limit.by_tensor() for _ in range(LIMIT_ROUNDS)])):
            self.rows[row].samples += samples
            self.rows[row].limits += flat
        del limit
        self._gpus.release()

    def _wait_for_memory(self, name: str) -> None:
        """Until what the ended process held can be had again."""
        deadline = time.monotonic() + FREED_S
        while True:
            self._gpus.release()
            left = self._gpus.used() - self._idle_bytes
            if left <= SLACK_BYTES:
                return
            if time.monotonic() > deadline:
                self._progress(f"{self._lab.name}: {name} has left {left / 1e6:.0f} MB of GPU memory", always=True)
                self._idle_bytes += left
                return
            time.sleep(0.1)

    def _check(self, way: Way) -> None:
        """After a first update, which compiles kernels, and shows the memory that the way takes."""
        way.change()
        way.prepare(counted=False)
        self._gpus.release()
        way.send()
        self.rows[way.name].extra_bytes = self._meter.extra()
        super()._check(way)

    def _flat(self) -> float:
        self._gpus.synchronize()
        return self._beside

    def _by_tensor(self) -> None:
        """Measured with the limit."""


class GpuLimit:
    """Copies of a model's bytes to the receiver's GPU, synchronised, into memory written before."""

    def __init__(self, source: Source, gpus: Gpus) -> None:
        self._gpus = gpus
        tensors = list(source.weights.values())
        nbytes = sum(tensor.nbytes for tensor in tensors)
        self._source = torch.ones(nbytes, dtype=torch.uint8, device=gpus.sender)
        self._target = torch.zeros(nbytes, dtype=torch.uint8, device=gpus.receiver)
        pieces = self._target.split([tensor.nbytes for tensor in tensors])
        self._pairs = [
            (piece, tensor.view(-1).view(torch.uint8)) for piece, tensor in zip(pieces, tensors, strict=True)
        ]
        self.by_tensor()
        self._source.copy_(self._target)  # the same bytes
        self.flat()

    def flat(self) -> float:
        """Seconds of one copy of all bytes."""
        self._gpus.synchronize()
        began = time.perf_counter()
        self._target.copy_(self._source)
        self._gpus.synchronize()
        return time.perf_counter() - began

    def by_tensor(self) -> float:
        """Seconds of a copy a tensor."""
        self._gpus.synchronize()
        began = time.perf_counter()
        for target, source in self._pairs:
            target.copy_(source)
        self._gpus.synchronize()
        return time.perf_counter() - began


def timed_on_gpus(
    model: Model,
    names: Sequence[str],
    repeats: int | None,
    gpus: Gpus,
    places: tuple[Path, RayHost | None],
    say: Progress,
) -> list[Row]:
    """A row for each of the two limits and for each way; `places`: a folder, and the Ray if there is one."""
    say(f"{model.name}: {model.nbytes / 1e6:.0f} MB in {len(model.tensors)} tensors", always=True)
    gpus.release()  # what the model before this one has left
    check_fits(model, gpus)
    meter = Meter(gpus)
    source = Source(model, str(gpus.sender))
    lab = Lab(model.name, source, model.nbytes, *places, receiver=str(gpus.receiver), ready=meter.zero)
    bench = GpuBench(lab, gpus, meter, names, repeats or ROUNDS, say)
    refused = _refused(names, gpus)
    for name, why in refused.items():
        bench.fail([name], why)
    bench.run(_units(lab, [name for name in names if name not in refused]))
    return list(bench.rows.values())


def _refused(names: Collection[str], gpus: Gpus) -> dict[str, str]:
    """The ways that these GPUs cannot have, and why."""
    if gpus.same:
        return {n: "NCCL refuses two ranks on one GPU: needs --receiver cuda:1" for n in names if n.startswith("nccl-")}
    return {n: "take=view needs the receiver on the sender's GPU" for n in names if "-view-" in n}


def _units(lab: Lab, names: Collection[str]) -> list[Unit]:
    return [
        *ours.units(lab, [name for name in names if name not in PEERS[CUDA]]),
        *gpu_peers.units(lab, [name for name in names if name in PEERS[CUDA]]),
    ]
