"""While a run goes on: `status.json` every second, a line when a phase takes long, stacks when it does not end.

The trainer's thread only notes which phase it is in (`Pulse`); a thread of its own (`Heartbeat`) writes and speaks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.monitor.gpu import GPU_MEMORY, SAMPLE_S, Gpus, gpu_peak
from transfer.worker.stacks import DUMP

WORKERS = (b"rlhf.rollout.worker", b"rlhf.rollout.vllm_serve", b"ray::RayWorker")  # how their command lines begin
RAYLET = b"raylet"  # a process of Ray, below which its workers are
RANK = b"rlhf.beside"  # in the command line of another rank of the trainer
EVERY_S = 1.0
LONG_S = 10.0  # a phase that is shorter than this is never called slow
SLOW = 5.0  # times the median of what the phase has taken before
STACKS_S = 300.0  # a phase that takes so long has all stacks dumped, once
SETTLED_S = 0.2  # how long a phase must have gone on before what NVML says is about it


@dataclass(slots=True)
class Pulse:
    """Where the run is."""

    stage: str = "starting"
    done: int = 0
    total: int = 0
    numbers: Mapping[str, float] = field(default_factory=dict)
    phase: str = ""
    since: float = field(default_factory=time.monotonic)
    taken: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=50)))
    busy: dict[str, list[float]] = field(default_factory=dict)  # shares of the GPU's time, by phase

    def at(self, stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """A stage has come so far."""
        self.stage, self.done, self.total, self.numbers = stage, done, total, dict(numbers)
        self.phase, self.since = "", time.monotonic()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """The run is in this phase."""
        self.phase, self.since = phase, time.monotonic()
        try:
            yield
        finally:
            self.taken[phase].append(time.monotonic() - self.since)
            self.phase, self.since = "", time.monotonic()

    def usual(self, phase: str) -> float | None:
        """The median of the seconds that a phase has taken; None at its first time."""
        taken = list(self.taken.get(phase, ()))
        return statistics.median(taken) if taken else None

    def saw(self, busy: float) -> None:
        """The GPU was busy for this share of the time just now, which says nothing of a phase that has only begun."""
        if self.phase and time.monotonic() - self.since > SETTLED_S:
            self.busy.setdefault(self.phase, []).append(busy)

    def idle(self, phases: Iterable[str]) -> dict[str, float]:
        """For each of these phases that was seen since it was asked for last, the share of time without a kernel."""
        seen = {phase: self.busy.pop(phase, []) for phase in list(phases)}
        return {phase: 1 - statistics.fmean(busy) for phase, busy in seen.items() if busy}


class Heartbeat:
    """A context around a run: reads its pulse, and keeps the largest memory of the trainer and its workers."""

    def __init__(self, folder: Path, pulse: Pulse, say: Callable[[str], None], every_s: float = EVERY_S) -> None:
        self.folder, self.pulse, self.say, self.every_s = folder, pulse, say, every_s
        self.long_s, self.stacks_s = LONG_S, STACKS_S
        self.peaks: dict[str, float] = {}
        self.gpus = Gpus()
        self.ask: Callable[[], Mapping[str, float]] = dict  # the workers, for GPU memory that NVML does not tell
        self._began = time.monotonic()
        self._warned: tuple[float, float] = (0.0, 0.0)  # which phase, by its beginning; after how many seconds
        self._dumped = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end.set()
        self._thread.join()
        with suppress(OSError):
            self.look()
            self.write(_ended(kind))

    def _beat(self) -> None:
        due = time.monotonic() + self.every_s
        while not self._end.wait(min(self.every_s, SAMPLE_S) if self.gpus.there() else self.every_s):
            if (busy := self.gpus.busy()) is not None:
                self.pulse.saw(busy)
            if self.gpus.there() and time.monotonic() < due:
                continue
            due = time.monotonic() + self.every_s
            with suppress(OSError):  # a full disk, say: what is noted is worth less than what is done
                self.look()
                self.write("running")
                self.watch()

    def look(self) -> None:
        """Raise the high-water marks."""
        marks = {"memory_mib/trainer": _resident_peak(os.getpid())}
        workers = [_resident_peak(pid) for pid in workers_of(os.getpid())]
        marks |= {"memory_mib/workers": max(workers)} if workers else {}
        if (mine := gpu_peak(reserved=False)) is not None:
            marks |= {f"{GPU_MEMORY}/trainer": mine, **self._of_workers()}
        for name, mib in marks.items():
            self.peaks[name] = max(mib, self.peaks.get(name, 0.0))

    def _of_workers(self) -> Mapping[str, float]:
        """GPU memory of each worker with all its processes: as NVML has it, or as they say themselves.

        In a container NVML may know processes by other ids.
        """
        used, found = self.gpus.memory(), dict[str, float]()
        if os.getpid() not in used:
            with suppress(Exception):  # a worker that is being ended, say: the heartbeat goes on
                return self.ask()
            return {}
        for pid in workers_of(os.getpid()):
            if pid in used and (name := _name_of(pid)) is not None:
                found[f"{GPU_MEMORY}/{name}"] = found.get(f"{GPU_MEMORY}/{name}", 0.0) + used[pid]
        return found

    def write(self, state: str) -> None:
        """`status.json`, replaced in one go."""
        pulse = self.pulse
        told: dict[str, Any] = {"state": state, "pid": os.getpid(), "time": time.time()}
        told |= {"seconds": time.monotonic() - self._began, "stage": pulse.stage, "done": pulse.done}
        told |= {"of": pulse.total, "phase": pulse.phase, "phase_seconds": time.monotonic() - pulse.since}
        told |= {"phase_usually": pulse.usual(pulse.phase), "numbers": pulse.numbers, **self.peaks}
        partial = self.folder / ".status.json"
        partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.folder / "status.json")

    def watch(self) -> None:
        """Say that a phase takes long, again whenever that has doubled; dump the stacks of one that does not end."""
        phase, since = self.pulse.phase, self.pulse.since
        took, usual = time.monotonic() - since, self.pulse.usual(phase)
        bound = max(self.long_s, SLOW * (usual or 0.0))
        if phase and self._warned[0] == since:
            bound = max(bound, 2 * self._warned[1])
        if not phase or took < bound:
            return
        self._warned = (since, took)
        before = "for the first time" if usual is None else f"usually {usual:.1f} s"
        stage = f"{self.pulse.stage} {self.pulse.done}/{self.pulse.total}"
        self.say(f"heartbeat: {stage}: {phase} has taken {took:.0f} s so far, {before}")
        if took > self.stacks_s and self._dumped != since:
            self._dumped = since
            dump_stacks(self.folder / "stacks.txt")
            self.say(f"heartbeat: stacks are in {self.folder / 'stacks.txt'} and in the workers' logs")


def _ended(kind: type[BaseException] | None) -> str:
    if kind is None:
        return "finished"
    stopped = issubclass(kind, (KeyboardInterrupt, SystemExit))
    return "stopped" if stopped else "failed"


def dump_stacks(path: Path) -> None:
    """Those of this process's threads at the end of `path`; those of each worker, and each other rank, into its log."""
    with path.open("a", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    for pid in [*workers_of(os.getpid()), *ranks_of(os.getpid())]:
        if _catches(pid, DUMP):  # else the signal would end it
            os.kill(pid, DUMP)


def ranks_of(parent: int) -> list[int]:
    """The other ranks of its trainer that a process has started."""
    found: list[int] = []
    for pid in _children(parent):
        with suppress(OSError):  # it has just ended
            found += [pid] if RANK in Path(f"/proc/{pid}/cmdline").read_bytes() else []
    return found


def workers_of(parent: int, within: bool = False) -> list[int]:
    """The worker processes that a process has started, and those that they have; `within`: it is of a worker itself.

    Looks nowhere else but below Ray's own process: once a second there is no time for all processes of a machine.
    """
    found: list[int] = []
    for pid in _children(parent):
        with suppress(OSError):  # it has just ended
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            ours = within or any(name in line for name in WORKERS)
            found += [pid] if ours else []
            found += workers_of(pid, ours) if ours or RAYLET in line.partition(b"\0")[0] else []
    return found


def _children(pid: int) -> list[int]:
    """Those that its threads have started."""
    found: list[int] = []
    with suppress(OSError):  # it has just ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", encoding="utf-8") as children:
                found += map(int, children.read().split())
    return found


def _status(pid: int, name: str) -> str:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return line.split()[1]
    return ""


def _resident_peak(pid: int) -> float:
    """MiB of memory that a process has had resident at most; 0 of one that is gone."""
    return int(_status(pid, "VmHWM") or 0) / 1024


def _catches(pid: int, signum: int) -> bool:
    return bool(int(_status(pid, "SigCgt") or "0", 16) >> (signum - 1) & 1)


def _name_of(pid: int) -> str | None:
    """worker-N: by the log worker-N.log, which a worker and its engine's processes have open."""
    with suppress(OSError):  # it has just ended
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if match := re.search(r"/(worker-\d+)\.log$", os.readlink(f"/proc/{pid}/fd/{number}")):
                    return match[1]
    return None
