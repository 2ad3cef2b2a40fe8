"""Times the ways of one model in rounds: each way once a round, in any order, beside a memcpy of the same bytes.

First each way runs once, to warm up and to be checked: the weights are changed, sent, and the digest of what the
receiver holds compared. A way that takes seconds is run in fewer rounds, or not again. Small models are sent twice in a
round and timed the second time, so that it does not matter who came before. Where the memory does not do for all
receivers at once, they are opened in groups, each with rounds of its own.
"""

from __future__ import annotations

import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transfer.bench.lab import RAY_STORE_COPIES, Lab, RayHost, Unavailable, reason
from transfer.bench.shapes import BenchError, Model
from transfer.bench.source import Limit, Source
from transfer.bench.ways import BY_TENSOR, CPU, FLAT, PEERS, Control, Parts, Unit, Way, needs_ray

ENOUGH_S = 1.5  # once a way's samples have taken this long together, it is not run again
SLOW_S = 1.0  # of a way that takes longer, the first run counts
SMALL_BYTES = 16 * 2**20
ROUNDS_SMALL, ROUNDS_LARGE = 15, 5
LIMIT_COPIES = 3  # of the weights, besides what the ways need: the trainer's, and two for memcpy
PROCESS_BYTES = 200 * 10**6  # of a receiving process, besides weights
MEMORY_SHARE = 0.9  # of what is free that may be used
SPEAK_S = 2.0  # between two lines of progress


@dataclass
class Row:
    """All that was measured of one way; `failed` says why there is nothing."""

    way: str
    samples: list[float] = field(default_factory=list)  # whole updates, seconds
    limits: list[float] = field(default_factory=list)  # the memcpy beside each sample, seconds
    parts: list[Parts] = field(default_factory=list)
    control: Control = field(default_factory=Control)
    verified: bool = False  # the receiver's digest was the trainer's
    extra_bytes: int | None = None  # of GPU memory, beyond the weights in both processes
    plan: str = ""  # how the receiver takes the bytes, where it says so
    failed: str = ""


class Progress:
    """Lines on stderr about what is being done, at most one every two seconds."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    def __call__(self, text: str, always: bool = False) -> None:
        """Say it, if it is time to."""
        now = time.monotonic()
        if always or now - self._last >= SPEAK_S:
            self._last = now
            print(f"[{now - self._began:5.1f} s] {text}", file=sys.stderr, flush=True)


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def memory_left(model: Model) -> float:
    """Bytes that the receivers of this model may use; BenchError if not even the weights themselves fit."""
    usable = MEMORY_SHARE * free_memory()
    needed = LIMIT_COPIES * model.nbytes
    if needed > usable:
        raise BenchError(
            f"{model.name} needs {needed / 1e9:.1f} GB of memory before any way is opened, and {usable / 1e9:.1f} GB "
            "can be used here"
        )
    return usable - needed


def timed_model(
    model: Model, names: Sequence[str], repeats: int | None, folder: Path, ray: RayHost | None, progress: Progress
) -> list[Row]:
    """A row for each of the two limits and for each way."""
    budget = memory_left(model)
    if repeats is None:
        repeats = ROUNDS_SMALL if model.nbytes <= SMALL_BYTES else ROUNDS_LARGE
    progress(f"{model.name}: {model.nbytes / 1e6:.0f} MB in {len(model.tensors)} tensors", always=True)
    lab = Lab(model.name, Source(model), model.nbytes, folder, ray)
    bench = HostBench(lab, names, repeats, progress)
    groups, too_big = _grouped(_units(lab, names), model.nbytes, budget)
    for unit in too_big:
        need = ((unit.holds + unit.peak + LIMIT_COPIES) * model.nbytes + PROCESS_BYTES) / 1e9
        bench.fail(unit.names, f"needs {need:.1f} GB of memory")
    for group in groups:
        bench.run(group)
    return list(bench.rows.values())


def _units(lab: Lab, names: Collection[str]) -> list[Unit]:
    from transfer.bench import ours, peers

    return [
        *ours.units(lab, [name for name in names if name not in PEERS[CPU]]),
        *peers.units(lab, [name for name in names if name in PEERS[CPU]]),
    ]


def _grouped(units: Sequence[Unit], nbytes: int, budget: float) -> tuple[list[list[Unit]], list[Unit]]:
    """Units that can be open at once in `budget` bytes of memory, and those that do not fit even alone."""

    def fits(together: Sequence[Unit]) -> bool:
        copies = sum(unit.holds for unit in together) + max(unit.peak for unit in together)
        return copies * nbytes + len(together) * PROCESS_BYTES <= budget

    groups: list[list[Unit]] = []
    for unit in filter(lambda unit: fits([unit]), units):
        if groups and fits([*groups[-1], unit]):
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return groups, [unit for unit in units if not fits([unit])]


class Bench(ABC):
    """The rows of one model, filled group by group."""

    def __init__(self, lab: Lab, names: Sequence[str], repeats: int, progress: Progress) -> None:
        self._lab = lab
        self._repeats = repeats
        self._progress = progress
        self.rows = {name: Row(name) for name in (FLAT, BY_TENSOR, *names)}

    def fail(self, names: Collection[str], why: str) -> None:
        """These ways cannot run here."""
        for name in names:
            self.rows[name] = Row(name, failed=why)

    def run(self, units: Sequence[Unit]) -> None:
        """Open the group, check each way once, then time them in rounds."""
        with ExitStack() as stack:
            ways = self._opened(units, stack)
            for way in ways:
                self._progress(f"{self._lab.name}: checking {way.name}")
                with self._or_failed([way.name]):
                    self._check(way)
            for number in range(self._repeats):
                random.Random(number).shuffle(ways)
                for way in ways:
                    self._progress(f"{self._lab.name}: round {number + 1} of {self._repeats}, {way.name}")
                    with self._or_failed([way.name]):
                        self._time(way)
                self._by_tensor()
            self._progress(f"{self._lab.name}: closing")

    def _opened(self, units: Sequence[Unit], stack: ExitStack) -> list[Way]:
        """All receiving processes start first, and are waited for then."""
        starting = []
        for unit in units:
            self._progress(f"{self._lab.name}: starting {unit.names[0]}")
            with self._or_failed(unit.names):
                starting.append((unit, stack.enter_context(unit.start())))
        ways: list[Way] = []
        for unit, connect in starting:
            self._progress(f"{self._lab.name}: waiting for {unit.names[0]}")
            with self._or_failed(unit.names):
                ways += connect()
        return ways

    @contextmanager
    def _or_failed(self, names: Collection[str]) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, the other ways can still be timed
            self.fail(names, reason(error))

    def _check(self, way: Way) -> None:
        expected = way.change()
        way.prepare(counted=True)
        seconds = self._sample(way)
        row = self.rows[way.name]
        row.control, row.plan = way.control(), way.plan()
        found = way.held()
        if found != expected:
            raise Unavailable(f"the receiver holds {found}, and the trainer {expected}")
        row.verified = True
        if seconds <= SLOW_S:
            row.samples, row.limits, row.parts = [], [], []

    def _time(self, way: Way) -> None:
        row = self.rows[way.name]
        if row.failed or sum(row.samples) > ENOUGH_S:
            return
        way.prepare(counted=False)
        if self._lab.nbytes <= SMALL_BYTES:
            way.send()
        self._sample(way)

    def _sample(self, way: Way) -> float:
        row = self.rows[way.name]
        limit = self._flat()
        began = time.perf_counter()
        way.send()
        seconds = time.perf_counter() - began
        row.samples.append(seconds)
        row.limits.append(limit)
        row.parts.append(way.parts())
        return seconds

    @abstractmethod
    def _flat(self) -> float:
        """Seconds of the limit, to set beside the sample that follows."""

    @abstractmethod
    def _by_tensor(self) -> None:
        """At the end of each round: the other limit."""


class HostBench(Bench):
    """The rows of one model on the CPU, with a memcpy beside each sample."""

    def __init__(self, lab: Lab, names: Sequence[str], repeats: int, progress: Progress) -> None:
        super().__init__(lab, names, repeats, progress)
        self._limit = Limit(lab.source.weights)

    def _by_tensor(self) -> None:
        self.rows[BY_TENSOR].limits.append(self._flat())
        self.rows[BY_TENSOR].samples.append(self._limit.by_tensor())

    def _flat(self) -> float:
        seconds = self._limit.flat()
        row = self.rows[FLAT]
        row.samples.append(seconds)
        row.limits.append(seconds)
        return seconds


def ray_for(models: Sequence[Model], names: Collection[str], folder: Path) -> RayHost | None:
    """The Ray that these ways need, with an object store for the largest model, or None."""
    if not any(needs_ray(name) for name in names):
        return None
    largest = max(model.nbytes for model in models) if "ray-store" in names else 0
    return RayHost(int(min(RAY_STORE_COPIES * largest, 0.3 * free_memory())), folder)
