"""Traces of torch.profiler as files: gzip, below 50 MB, for chrome://tracing and ui.perfetto.dev.

A worker traces itself (`Traces`) while its trainer's step goes on: all threads, as completions run in one and messages
in others, and no more than `LONGEST_S` seconds. Large engines have about 1e5 events a second, which makes 2 MB.
"""

from __future__ import annotations

import gzip
import math
import shutil
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transfer.agreement.wire import Refused

LONGEST_S = 10.0
MOST_BYTES = 50 * 10**6
READY_S = 60.0  # for a profiler to start
WRITTEN_S = 300.0  # for its file
MOST_TRACES = 100  # of a worker: whoever has its token may ask for them
ATTEMPTS = 4  # to find a length that fits
FOLDER = "profile"  # of a run
EVENT, LAST = "  {\n", "  ]"  # lines with which an event begins, and the end of all events


class Traces:
    """A worker's traces, one after the other, in the folder of its run; `log` is its log there, None without one."""

    def __init__(self, log: Path | None) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._running: Trace | None = None
        self._begun = 0

    def start(self, step: int) -> None:
        """Begin the trace of this step; Refused 409 without a folder, or while another one goes on."""
        if self._log is None:
            raise Refused(409, "this worker has no process or no run's folder of its own to write a trace into")
        with self._lock:
            if self._running is not None:
                raise Refused(409, "a trace goes on: stop it first")
            if self._begun == MOST_TRACES:
                raise Refused(409, f"this worker has written {MOST_TRACES} traces: start it again for more")
            self._begun += 1
            self._running = Trace(self._log.parent / FOLDER / f"step-{step}-{self._log.stem}.json.gz")

    def stop(self) -> str:
        """End the trace and write it; what is to be said of it. Refused 409 if none was begun, or it failed."""
        with self._lock:
            if self._running is None:
                raise Refused(409, "no trace was begun")
            try:
                return self._running.stop()  # meanwhile none begins
            finally:
                self._running = None


class Trace:
    """A trace of all threads of this process, in a thread of its own, which begins and ends it."""

    def __init__(self, path: Path, longest_s: float = LONGEST_S, most_bytes: int = MOST_BYTES) -> None:
        self._path, self._longest_s, self._most_bytes = path, longest_s, most_bytes
        self._ready, self._end = threading.Event(), threading.Event()
        self._said = ""
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="trace", daemon=True)
        self._thread.start()
        if not self._ready.wait(READY_S):
            raise Refused(409, f"the profiler did not start within {READY_S:g} s")
        self._check()

    @property
    def going(self) -> bool:
        """Whether it is traced or written yet."""
        return self._thread.is_alive()

    def stop(self) -> str:
        """End it if it has not ended; what is to be said of its file. Refused 409 if there is none."""
        self._end.set()
        self._thread.join(WRITTEN_S)
        if self._thread.is_alive():
            raise Refused(409, f"the trace was not written within {WRITTEN_S:g} s")
        self._check()
        return self._said

    def _check(self) -> None:
        if self._fault is not None:
            raise Refused(409, f"the trace is lost: {type(self._fault).__name__}: {self._fault}")

    def _work(self) -> None:
        try:
            traced = profiler(all_threads=True)
            traced.start()
            self._ready.set()
            whole = self._end.wait(self._longest_s)
            traced.stop()
            self._said = write(traced, self._path, self._most_bytes)
            if not whole:
                self._said = f"{self._path.name} has the first {self._longest_s:g} s{self._said and '; '}{self._said}"
        except Exception as error:  # whatever the profiler raises; a worker goes on sampling
            self._fault = error
        finally:
            self._ready.set()


def profiler(all_threads: bool = False) -> Any:
    """A torch.profiler.profile of this thread and those that compute for it, or of all; without shapes and stacks."""
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import profile

    return profile(experimental_config=_ExperimentalConfig(profile_all_threads=True)) if all_threads else profile()


def write(traced: Any, path: Path, most_bytes: int = MOST_BYTES) -> str:
    """Write what a profiler has traced as gzip of at most so many bytes; a line if that is not all of it, else ""."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.with_name(f".{path.stem}")
    try:
        traced.export_chrome_trace(str(raw))
        return compress(raw, path, most_bytes)
    finally:
        raw.unlink(missing_ok=True)


def compress(raw: Path, path: Path, most_bytes: int) -> str:
    """`raw` as gzip in `path`; where that is too large its beginning, or nothing. A line that says so, else ""."""
    partial = path.with_name(f".{path.name}")
    share = 1.0
    try:
        for _ in range(ATTEMPTS):
            _zip(raw, partial, share)
            size = partial.stat().st_size
            if size <= most_bytes:
                partial.replace(path)
                shown = f"{path.name} has the first {share:.0%} of its events, to be below {most_bytes / 1e6:g} MB"
                return shown if share < 1 else ""
            share *= 0.9 * most_bytes / size
    finally:
        partial.unlink(missing_ok=True)
    return f"{path.name} would have more than {most_bytes / 1e6:g} MB, and is not written"


def _zip(raw: Path, to: Path, share: float) -> None:
    """All of it, or the earliest events that are about this share."""
    if share == 1:
        with raw.open("rb") as source, gzip.open(to, "wb", 5) as target:
            shutil.copyfileobj(source, target, 2**20)
        return
    times = array("d", sorted(time for _, time in _events(raw) if time is not None))
    until = times[int(share * len(times))] if times else math.inf
    with gzip.open(to, "wt", 5, encoding="utf-8") as target:
        last = False  # whether it was an event
        for text, time in _events(raw):
            if time is None or time <= until:
                event = text.startswith(EVENT)
                target.write(("" if not last else ",\n" if event else "\n") + text)
                last = event


def _events(raw: Path) -> Iterator[tuple[str, float | None]]:
    """The text before the events, each event with its time in microseconds, and the text behind them."""
    lines: list[str] = []
    with raw.open(encoding="utf-8", errors="replace") as source:
        for line in source:
            if lines and (line == EVENT or (line.startswith(LAST) and lines[0] == EVENT)):
                yield _event(lines)
                lines = []
            lines.append(line)
    yield _event(lines)


def _event(lines: list[str]) -> tuple[str, float | None]:
    text = "".join(lines)
    if not text.startswith(EVENT):
        return text, None
    named = next((line for line in lines if line.startswith('    "ts":')), "")
    return text.rstrip().rstrip(","), float(named.partition(":")[2].strip(" ,\n")) if named else None
