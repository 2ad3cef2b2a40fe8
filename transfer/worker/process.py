"""A worker as a process of this machine: started with one line of JSON on stdin, reports its port, ends with us."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from transfer.agreement.shown import printable
from transfer.agreement.wire import TransferError

DYING_S = 1.0  # from a broken connection to the end of the process behind it
STOP_S = 5.0  # how long a worker process may take to end before it is killed
LOG_TAIL = 20  # lines of a dead worker's log that its error shows
SOURCE = Path(__file__).resolve().parents[2]  # where the packages are imported from


def python_path() -> str:
    """PYTHONPATH for a process that is to import what this one does."""
    return os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))


class WorkerProcess:
    """`python -m module`, which calls serve.serve_parent; it ends with this context, and with this process."""

    def __init__(self, name: str, module: str, spec: str, log: Path, restarts: int = 0) -> None:
        self.name = name
        self._command = [sys.executable, "-m", module]
        self._spec = spec
        self._log = log
        self._restarts = restarts  # how often it may be started again
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> WorkerProcess:
        self._log.write_bytes(b"")
        with self._log.open("ab") as log:  # so that what others write there, too, stays
            self._process = self._started(log)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is None:
            return
        with self._process:  # closes the pipes, then waits for a process that is gone
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process's number; only within the context."""
        assert self._process is not None
        return self._process.pid

    @property
    def reports(self) -> bool:
        """Whether `port` need not wait: the process has said its port, or is dead."""
        return self._said_something(0.0)

    def restarted(self) -> bool:
        """Start a new process in place of one that has died; False if it lives, or was started too often already.

        To be called in a thread that lasts: the kernel ends the process with the thread that started it.
        """
        assert self._process is not None
        try:
            self._process.wait(DYING_S)
        except subprocess.TimeoutExpired:
            return False
        if self._restarts == 0:
            return False
        self._restarts -= 1
        self.__exit__()
        with self._log.open("ab") as log:
            self._process = self._started(log)
        return True

    def port(self, deadline: float) -> int:
        """The port that the worker reports; TransferError with its log if it dies or stays silent until `deadline`."""
        assert self._process is not None and self._process.stdout is not None
        if not self._said_something(max(0.0, deadline - time.monotonic())):
            raise TransferError(
                f"{self.name} did not come up within transfer.sender.start_timeout_s; {self._log} ends:\n{self.tail()}"
            ) from TimeoutError()
        report = self._process.stdout.readline()  # the worker writes the line in one piece, or dies
        if not report:
            raise TransferError(f"{self.name} died while it started; {self._log} ends:\n{self.tail()}")
        return int(json.loads(report)["port"])

    def _said_something(self, within_s: float) -> bool:
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return bool(selector.select(within_s))

    def _started(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        variables = {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | variables,
            start_new_session=True,  # Ctrl-C in the terminal is for the trainer
        )
        assert process.stdin is not None
        try:
            process.stdin.write(self._spec.encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:  # dead already: port() will say so
            with suppress(BrokenPipeError):
                process.stdin.close()  # else whoever closes it would find that the rest cannot be written
        return process

    def tail(self) -> str:
        """The last lines of the process's log."""
        return printable("\n".join(self._log.read_text(errors="replace", encoding="utf-8").splitlines()[-LOG_TAIL:]))
