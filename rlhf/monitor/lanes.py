"""Who does what when: the trainer's phases and the workers' requests, a line a step, into `lanes.jsonl`.

Any thread may note; the trainer's writes. What it looks like is said in rlhf/reports/lanes.py, which reads it back.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rlhf.reports.lanes import (
    SAMPLE,
    TRAINER,
    Line,
    Span,
    as_row,
    before_as_row,
    history,
    merged,
    summed,
)
from rlhf.reports.run_folder import json_lines, objects

MOST_BYTES = 2 * 2**20  # of the file; then its older half becomes sums
GAP_S = 5e-4  # between two requests to a worker that count as one
SHORT_S = 5e-5  # of what is not written


class Lanes:
    """A run's lanes, from `began` on (time.monotonic()); without a file, nothing is noted.

    `done`: the step after which the run goes on in a file that is there; what was noted later is dropped.
    """

    def __init__(
        self,
        path: Path | None,
        began: float = 0.0,
        done: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._path, self._began, self._say = path, began, say
        self._lock = threading.Lock()
        self._noted: dict[str, list[Span]] = {}
        self._step, self._until = done or 0, 0.0
        if path is not None and done is not None:
            self._go_on(path, done)

    def note(self, lane: str, what: str, began: float, ended: float) -> None:
        """The lane did this from `began` to `ended`, in seconds of time.monotonic()."""
        if self._path is not None:
            with self._lock:
                self._noted.setdefault(lane, []).append((what, began - self._began, ended - self._began))

    def asked(self, worker: str, began: float, ended: float) -> None:
        """A worker, by its sender's name ("worker 0 (http://...)"), had a request."""
        self.note(worker.partition(" (")[0], SAMPLE, began, ended)

    def write(self, step: int) -> None:
        """The step is done: what was noted goes into the file. A full disk ends that, and not the run."""
        with self._lock:
            noted, self._noted = self._noted, {}
        self._step = step
        if self._path is None or not noted:
            return
        self._until = max([self._until, *(ended for _, _, ended in noted.get(TRAINER, ()))])
        line = Line(step, self._until, dict(_kept(noted)))
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(as_row(line)) + "\n")
                size = file.tell()
            if size > MOST_BYTES:
                _halve(self._path)
        except OSError as error:
            self._path = None
            self._say(f"warning: lanes.jsonl ends here, and the run goes on: {error}")

    def close(self) -> None:
        """What came after the last step goes into the file, too."""
        self.write(self._step)

    def _go_on(self, path: Path, done: int) -> None:
        """Let the file end where the run goes on, and its clock begin there."""
        kept = history(json_lines(path)).up_to(done)
        self._until = kept.until
        self._began = time.monotonic() - kept.until
        try:
            rows = [*([before_as_row(kept.before)] if kept.before else []), *map(as_row, kept.lines)]
            _write(path, [json.dumps(row) for row in rows])
        except OSError as error:
            self._path = None
            self._say(f"warning: lanes.jsonl is not written, and the run goes on: {error}")


def _kept(noted: Mapping[str, Sequence[Span]]) -> Iterator[tuple[str, list[Span]]]:
    """What is worth a place in the file, by lane."""
    for lane, spans in noted.items():
        joined = merged(spans, 0.0 if lane == TRAINER else GAP_S)
        if long := [(what, began, ended) for what, began, ended in joined if ended - began > SHORT_S]:
            yield lane, long


def _halve(path: Path) -> None:
    """Let the older half of the lines become sums."""
    lines = path.read_text(encoding="utf-8").splitlines()
    half = (len(lines) + 1) // 2
    before = summed(history(objects(lines[:half])))
    _write(path, [*([json.dumps(before_as_row(before))] if before else []), *lines[half:]])


def _write(path: Path, lines: Sequence[str]) -> None:
    """In one go."""
    partial = path.with_name(f".{path.name}")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(path)
