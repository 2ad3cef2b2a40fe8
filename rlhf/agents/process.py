"""One row's process, with whatever it starts: a session of the system's of its own, all of which is killed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rlhf.agents import guard
from transfer.agreement.shown import one_line

TAIL = 2000  # bytes of what it has printed last, of which a line is shown
GUARD_S = 5.0  # for the guard to end


def words_of(command: str) -> list[str]:
    """The program and its arguments; `python` is that of the run."""
    words = shlex.split(command)
    return [sys.executable, *words[1:]] if words[0] == "python" else words


class Guard:
    """A process that outlives this one for a moment, to end what this one has begun; a context."""

    def __enter__(self) -> Guard:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(guard.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(GUARD_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def tell(self, sign: str, group: int) -> None:
        """That a group has begun (+), or ended (-)."""
        assert self._process.stdin is not None
        with self._lock, suppress(OSError):  # somebody has killed it
            self._process.stdin.write(f"{sign}{group}\n".encode())
            self._process.stdin.flush()


class AgentProcess:
    """A program that runs, in this process's folder; what it prints goes to a file."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path, guard: Guard) -> None:
        self._log, self._guard = log, guard
        with log.open("wb") as printed:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                start_new_session=True,
            )
        guard.tell("+", self._process.pid)
        self.ended = False

    def watch(self, then: Callable[[], None]) -> None:
        """Tell, from another thread, when it has ended."""

        def wait() -> None:
            with suppress(ChildProcessError):  # killed, and waited for, meanwhile
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)  # its number stays its own
            self.ended = True
            then()

        threading.Thread(target=wait, name="agent", daemon=True).start()

    def close(self) -> int:
        """End it, with all that it has started; its exit code."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._guard.tell("-", self._process.pid)
        return self._process.returncode

    @property
    def last_words(self) -> str:
        """The last line that it has printed."""
        with self._log.open("rb") as printed:
            printed.seek(max(0, self._log.stat().st_size - TAIL))
            lines = printed.read().decode(errors="replace").strip().splitlines()
        return one_line(lines[-1], 200) if lines else "it has printed nothing"
