"""How a run ends before it is done: by an error that explains itself, by a signal, or with its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transfer.wire import RemoteError, TransferError

TERMINATED = 128 + signal.SIGTERM  # exit codes, as shells have them
INTERRUPTED = 128 + signal.SIGINT


class RunError(RuntimeError):
    """The run cannot go on, for a reason that the message gives in full."""


EXPLAINED = (ValueError, RunError, RemoteError, TransferError)  # shown as one message, without a traceback


def terminate_as_interrupt() -> None:
    """SIGTERM unwinds as Ctrl-C does, so that workers and shared memory are released."""

    def stop(*_: object) -> None:
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, stop)


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Put SIGTERM's handler back after a call that replaces it, as ray.init does."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def end_with_parent() -> None:
    """SIGTERM to this process once the one that started it with `multiprocessing` is gone, in whatever way."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
