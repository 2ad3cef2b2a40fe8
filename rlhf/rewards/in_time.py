"""A call of somebody's function that may hang, with a deadline, in the process that asks.

In the main thread a signal raises an exception in the function, wherever it waits or loops: nothing of it is left. No
signal reaches other threads, so that there the function is called in one of its own, which is told to end, and left
behind where it does not. What holds the interpreter's lock, a hopeless regular expression, say, hears neither: for that
there is shell/apart.py.
"""

from __future__ import annotations

import ctypes
import queue
import signal
import threading
from collections.abc import Callable
from typing import Any

from rlhf.shell.apart import LateError
from rlhf.shell.ending import RunError

SIGNAL = signal.SIGVTALRM  # which hardly anybody uses; SIGALRM is that of functions with deadlines of their own
AGAIN_S = 1.0  # a function may swallow the exception; it gets another after so long
MOST_LEFT = 8  # calls left behind that go on


class _Late(BaseException):
    """In the function that is late; no Exception, as functions catch those."""


class _Watch:
    """Whether a call is over, and what tells the main thread when it is late."""

    def __init__(self, timeout_s: float) -> None:
        self.over = False
        self._done = threading.Event()
        threading.Thread(target=self._run, args=(timeout_s,), name="deadline", daemon=True).start()

    def end(self) -> None:
        self.over = True
        self._done.set()

    def _run(self, wait_s: float) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not self._done.wait(wait_s) and not self.over:
            signal.pthread_kill(main, SIGNAL)
            wait_s = AGAIN_S


_watches: list[_Watch] = []  # of the calls in the main thread, the innermost last
_left: list[threading.Thread] = []


def in_time(call: Callable[[], Any], timeout_s: float) -> Any:
    """What the call returns, or raises; LateError once it has taken longer.

    RunError where more and more of such calls never end.
    """
    if threading.current_thread() is threading.main_thread():
        return _here(call, timeout_s)
    return _beside(call, timeout_s)


def _here(call: Callable[[], Any], timeout_s: float) -> Any:
    _listen()
    watch = _Watch(timeout_s)
    _watches.append(watch)
    try:
        try:
            return call()
        finally:
            watch.over = True
    except _Late:
        raise LateError from None
    finally:
        watch.end()
        _watches.remove(watch)


def _listen() -> None:
    """From now on, also after the call: a signal that comes late must find its handler."""
    if signal.getsignal(SIGNAL) is not _heard:
        signal.signal(SIGNAL, _heard)


def _heard(number: int, frame: Any) -> None:
    if _watches and not _watches[-1].over:
        raise _Late


def _beside(call: Callable[[], Any], timeout_s: float) -> Any:
    _left[:] = [thread for thread in _left if thread.is_alive()]
    if len(_left) >= MOST_LEFT:
        raise RunError(
            f"{len(_left)} calls of the reward's function hang, and nothing ends them: give it deadlines of its own, "
            "or set reward.process=true, which lets its process be killed"
        )
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    thread = threading.Thread(target=_run, args=(call, outcome), name="reward", daemon=True)
    thread.start()
    try:
        good, answer = outcome.get(timeout=timeout_s)
    except queue.Empty:
        _end(thread)
        raise LateError from None
    if good:
        return answer
    raise answer


def _run(call: Callable[[], Any], outcome: queue.SimpleQueue[tuple[bool, Any]]) -> None:
    try:
        outcome.put((True, call()))
    except BaseException as error:
        outcome.put((False, error))


def _end(thread: threading.Thread) -> None:
    """Raise an exception where the thread's Python code is next; what waits outside of Python hears it afterwards."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Late))
    thread.join(0.1)
    if thread.is_alive():
        _left.append(thread)
