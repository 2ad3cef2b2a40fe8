"""How a run ends before it is done: by an error that explains itself, by a signal, or with its parent."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from transfer.wire import RemoteError, TransferError

TERMINATED = 128 + signal.SIGTERM  # exit codes, as shells have them
INTERRUPTED = 128 + signal.SIGINT
RESUMABLE = 75  # instead of TERMINATED, once there is a checkpoint to go on from; sysexits.h calls it EX_TEMPFAIL


class RunError(RuntimeError):
    """The run cannot go on, for a reason that the message gives in full."""


EXPLAINED = (ValueError, RunError, RemoteError, TransferError)  # shown as one message, without a traceback


def terminate_as_interrupt() -> None:
    """SIGTERM unwinds as Ctrl-C does, so that workers and shared memory are released."""

    def stop(*_: object) -> None:
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, stop)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """RunError if a process is in this block for the same folder already; the lock ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunError(f"another process trains in {folder}: end it, or wait until it has ended") from None
    finally:
        os.close(descriptor)


def check_free(folder: Path) -> None:
    """RunError if a process is in `alone` for the folder."""
    if folder.is_dir():
        with alone(folder):
            pass


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """RunError in place of what the operating system says where nothing more can be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"the disk is full ({error}): make room, then go on with python -m rlhf.resume {shlex.quote(str(folder))}"
        ) from error


@contextmanager
def unbroken() -> Iterator[None]:
    """The first SIGTERM or Ctrl-C inside counts at the end, a second one at once; only in a program's main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    acts = {signum: handler for signum, handler in handlers.items() if callable(handler)}

    def hold(signum: int, frame: FrameType | None) -> None:
        held.append(signum)
        if len(held) > 1:
            acts[signal.Signals(signum)](signum, frame)

    for signum in acts:
        signal.signal(signum, hold)
    try:
        yield
    finally:
        for signum, act in acts.items():
            signal.signal(signum, act)
        if held:
            acts[signal.Signals(held[0])](held[0], None)


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
