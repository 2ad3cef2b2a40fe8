"""Runs checks side by side, each in a process that may die or hang without taking anything else along.

The checks of one lane come one after the other in one process, which saves imports; if it has to be killed, the next
check gets a new one. Whatever a check has started goes with its process.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from transfer.doctor.finding import FAIL, LATE, SKIP, Check, Finding, Result, late, one_line, skip
from transfer.doctor.load import waited_s
from transfer.worker.process import python_path

TICK_S = 0.1  # between two looks at the clock
SHARED = Path("/dev/shm")
END_S = 3.0  # for processes to end by themselves, Ray's above all, before they are killed

Results = dict[str, Result]  # by the check's name
Progress = Callable[[int, list[str]], None]  # how many checks are done, and which are running


def run(checks: Sequence[Check], folder: Path, deadline_s: float, progress: Progress) -> list[Result]:
    """Every check's result, in the order given; `folder` is for whatever they write, and the caller's to remove."""
    unknown = {need for check in checks for need in check.needs} - {check.name for check in checks}
    assert not unknown, f"checks that do not exist are needed: {unknown}"
    results: Results = {}
    end = time.monotonic() + deadline_s
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        lanes = []
        for name in dict.fromkeys(check.lane for check in checks):
            lanes.append(Lane([check for check in checks if check.lane == name], folder / f"{name}.log", selector))
            stack.callback(lanes[-1].kill)
        while len(results) < len(checks) and time.monotonic() < end:
            for lane in lanes:
                lane.advance(results)
            for key, _ in selector.select(TICK_S):
                key.data.hear(results)
            progress(len(results), [lane.current.name for lane in lanes if lane.current])
        for lane in lanes:
            lane.give_up(results, f"the doctor's {deadline_s:g} s were over")
        _wait_until(lambda: all(lane.ended for lane in lanes), min(END_S, max(0.0, end + END_S - time.monotonic())))
    return [results[check.name] for check in checks]


class Lane:
    """Checks that run one after the other, and the process in which they do."""

    def __init__(self, checks: Sequence[Check], log: Path, selector: selectors.BaseSelector) -> None:
        self.current: Check | None = None
        self._todo = deque(checks)
        self._log = log
        self._selector = selector
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._due = 0.0  # when to look whether it is over its deadline
        self._waited_s = 0.0  # for a processor, before it began

    def advance(self, results: Results) -> None:
        """Stop a check that is over its deadline, and begin the next one once what it needs is known."""
        if self.current is not None and time.monotonic() > self._due and not self._has_time(self.current):
            words = f"no end within {self.current.deadline_s:g} s"
            self.kill()
            self._end(results, Finding(FAIL, words))
        while self.current is None and self._todo and all(need in results for need in self._todo[0].needs):
            check = self._todo.popleft()
            finding = _not_run(check, results)
            if finding is not None:
                results[check.name] = Result(check, finding)
            else:
                self._begin(check)
        if self.current is None and not self._todo:
            self._close()

    def hear(self, results: Results) -> None:
        """Take the answer of the check under way, or note that its process has died."""
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()  # written in one piece
        if line.endswith(b"\n"):
            self._end(results, Finding(**json.loads(line)))
        elif self.current is None and self._todo:
            self.kill()  # the next check gets a new one
        elif self.current is None:
            self._selector.unregister(self._process.stdout)  # it is ending, as it should
        else:
            self._end(results, Finding(FAIL, f"its process {self.kill()}: {one_line(self._last_words())}"))

    def give_up(self, results: Results, why: str) -> None:
        """Stop; of what has not ended by now, or not begun, nobody knows whether it works."""
        if self.current is not None:
            self.kill()
            self._end(results, late(f"not done when {why}"))
        for check in self._todo:
            finding = skip(check.skip) if check.skip else late(f"not begun when {why}")
            results[check.name] = Result(check, finding)
        self._todo.clear()
        self._close()

    @property
    def ended(self) -> bool:
        """Whether the process is gone, or there never was one."""
        return self._process is None or _has_ended(self._process)

    def kill(self) -> str:
        """End the process and all that it has started; how it ended."""
        process, self._process = self._process, None
        if process is None:
            return "was gone"
        if process.stdout is not None and process.stdout in self._selector.get_map():
            self._selector.unregister(process.stdout)
        _kill_family(process.pid)
        code = process.wait()
        _sweep(process.pid)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def _begin(self, check: Check) -> None:
        self.current, self._began = check, time.monotonic()
        self._due = self._began + check.deadline_s
        self._waited_s = 0.0 if self._process is None else waited_s(_family(self._process.pid))
        order = json.dumps({"target": check.target, "arguments": dict(check.arguments)}).encode()
        if self._process is None:
            self._process = self._started()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # dead already: its output has ended, too
            self._process.stdin.write(order + b"\n")
            self._process.stdin.flush()

    def _has_time(self, check: Check) -> bool:
        """Whether a check would be within its deadline, had its processes never waited for a processor."""
        assert self._process is not None
        waited = max(0.0, waited_s(_family(self._process.pid)) - self._waited_s)
        left = check.deadline_s + waited - (time.monotonic() - self._began)
        self._due = time.monotonic() + max(TICK_S, left)
        return left > 0

    def _started(self) -> subprocess.Popen[bytes]:
        variables = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "TMPDIR": str(self._log.parent)}
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "transfer.doctor.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | variables,
                start_new_session=True,  # Ctrl-C in the terminal is for the doctor
            )
        stdout: IO[bytes] | None = process.stdout
        assert stdout is not None
        self._selector.register(stdout, selectors.EVENT_READ, self)
        return process

    def _end(self, results: Results, finding: Finding) -> None:
        check, self.current = self.current, None
        assert check is not None
        if finding.status == FAIL and not finding.do:
            finding = Finding(finding.status, finding.seen, check.do, finding.data)
        results[check.name] = Result(check, finding, time.monotonic() - self._began)

    def _close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace", encoding="utf-8").splitlines()
        return lines[-1] if lines else "it said nothing"


def _not_run(check: Check, results: Results) -> Finding | None:
    """Why a check is left out; None if it is not."""
    if check.skip:
        return skip(check.skip)
    for need in check.needs:
        if results[need].finding.status in (SKIP, LATE):
            return Finding(results[need].finding.status, results[need].finding.seen, results[need].finding.do)
        if not results[need].works:
            return skip(f"needs what failed above: {need}")
    return None


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(TICK_S / 4)


def _has_ended(process: subprocess.Popen[Any]) -> bool:
    """Whether the process has ended; it is not reaped, so that its number, also as a session's, stays its own."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_family(pid: int) -> None:
    """Kill a process, all below it, and all that belong to its session or to one below it."""
    end = time.monotonic() + END_S  # one that the kernel keeps, in a driver's call say, goes when it comes back
    while (living := _family(pid)) and time.monotonic() < end:
        for member in living:
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        time.sleep(0.01)


def _sweep(pid: int) -> None:
    """Remove what torch and CUDA leave in /dev/shm of a process that shared GPU memory, however it ended."""
    for name in (f"torch_{pid}_*", f"cuda.shm.{os.getuid()}.{pid:x}.*"):
        for path in SHARED.glob(name):
            path.unlink(missing_ok=True)


def _family(pid: int) -> set[int]:
    """The members that run still, by their numbers."""
    parents, sessions, dead = {}, {}, set()
    for entry in os.listdir("/proc"):
        with suppress(OSError):  # ended meanwhile
            if entry.isdigit():
                stat = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8")
                state, parent, _, session = stat.rpartition(")")[2].split()[:4]
                parents[int(entry)], sessions[int(entry)] = int(parent), int(session)
                dead |= {int(entry)} if state in "ZX" else set()
    family: set[int] = {pid}
    while more := {p for p in parents if parents[p] in family or sessions[p] in family} - family:
        family |= more
    return {member for member in family if member in parents} - dead - {os.getpid()}
