"""A function in a process of its own, which is killed where it has not answered in time.

For what no thread can end: an interpreter that computes 9**9**9, or searches by a hopeless regular expression, holds
its lock until it is done. The process ends with whoever asks it, also when that is killed in the middle of a call.
"""

from __future__ import annotations

import importlib
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

STARTED_S = 120.0  # until it has imported what it needs
GRACE_S = 10.0  # CPU seconds beyond a call's deadline, after which the kernel ends a process that nobody has killed


class LateError(Exception):
    """What was asked for has not come within its deadline."""


class RaisedError(Exception):
    """What the function raised, as a text; or that its process ended."""


class Apart:
    """Calls `function` (module:name) in a process of its own, started by the first call and after each that was late.

    Arguments and results are pickled; `memory` bounds its address space in bytes, 0 does not. A call at a time.
    """

    def __init__(self, function: str, memory: int = 0) -> None:
        self._function, self._memory = function, memory
        self._close: weakref.finalize[Any, Any] | None = None
        self._pipe: Connection | None = None

    def __call__(self, *arguments: Any, timeout_s: float, **named: Any) -> Any:
        """What the function returns; RaisedError with what it raises, LateError where it has taken too long."""
        pipe = self._pipe or self._started()
        try:
            pipe.send((arguments, named, timeout_s + GRACE_S))
            if not pipe.poll(timeout_s):
                raise LateError
            good, answer = pipe.recv()
        except (EOFError, OSError):
            self.close()
            raise RaisedError("its process has ended: it crashed, or wanted too much memory") from None
        except BaseException:  # also an interrupt, after which its answer would come as another's
            self.close()
            raise
        if not good:
            raise RaisedError(answer)
        return answer

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._close is not None:
            self._close()
        self._close = self._pipe = None

    def _started(self) -> Connection:
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for whoever asks
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, _places()))},
            )
        self._close = weakref.finalize(self, _end, process, ours)  # at the latest when this process ends
        try:
            ours.send((self._function, sys.path, self._memory))
            said = ours.recv() if ours.poll(STARTED_S) else f"it has not started within {STARTED_S:g} seconds"
        except (EOFError, OSError):
            said = "its process has ended as it started"
        except BaseException:
            self.close()
            raise
        if said is not None:
            self.close()
            raise RaisedError(said)
        self._pipe = ours
        return ours


def _places() -> list[str]:
    """Where this package is, for a process that has another current folder in mind."""
    return [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]


def _end(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    pipe.close()
    process.kill()
    process.wait()


def told(error: BaseException) -> str:
    """An exception and where it was raised, on one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"


def serve(descriptor: int) -> None:
    """Answer calls until whoever asks has gone."""
    pipe, inbox = Connection(descriptor), queue.SimpleQueue[Any]()
    function, sys.path[:], memory = pipe.recv()
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    module, _, name = function.partition(":")
    try:
        called = getattr(importlib.import_module(module), name)
    except Exception as error:
        pipe.send(told(error))
        return
    pipe.send(None)
    threading.Thread(target=_hear, args=(pipe, inbox), daemon=True).start()
    while True:
        arguments, named, most_cpu_s = inbox.get()
        signal.setitimer(signal.ITIMER_PROF, most_cpu_s)  # its signal ends a process that does not handle it
        try:
            answer = True, called(*arguments, **named)
        except Exception as error:
            answer = False, told(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(answer)


def _hear(pipe: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
