"""How a run ends before it is done: by an error that explains itself, by a signal, or with its parent."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rlhf.shell.going_on import goes_on_by
from transfer.agreement.shown import told
from transfer.agreement.wire import RemoteError, TransferError
from transfer.backends.folder_lock import NO_LOCKS

STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # schedulers announce the end by any of them
LOST = getattr(signal, "SIGRTMIN", signal.SIGURG)  # by ranks/watch.py alone: a rank of the trainer is gone
TERMINATED = 128 + signal.SIGTERM  # exit codes, as shells have them
STOPPED = frozenset(128 + signum for signum in STOPS)
INTERRUPTED = 128 + signal.SIGINT
RESUMABLE = 75  # instead of those of STOPPED, once there is a checkpoint to go on from; sysexits.h calls it EX_TEMPFAIL


class RunError(RuntimeError):
    """The run cannot go on, for a reason that the message gives in full."""


EXPLAINED = (ValueError, RunError, RemoteError, TransferError)  # shown as one message, without a traceback


@contextmanager
def explained(what: Callable[[], str]) -> Iterator[None]:
    """RunError of one line, `what` and the error, in place of an error that does not explain itself."""
    try:
        yield
    except EXPLAINED:
        raise
    except Exception as error:
        raise RunError(f"{what()}: {told(error)} (HYDRA_FULL_ERROR=1 shows where)") from error


def terminate_as_interrupt() -> None:
    """SIGTERM and its kind unwind as Ctrl-C does, so that workers and shared memory are released.

    What whoever started the process has it ignore, as nohup does SIGHUP, stays ignored, but for SIGTERM.
    """

    def stop(signum: int, _: object) -> None:
        raise SystemExit(128 + signum)

    for signum in STOPS:
        if signum == signal.SIGTERM or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, stop)


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """RunError if a process is in this block for the same folder already; the lock ends with the process.

    False where the file system has no locks, so that nobody knows.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _locked(descriptor, folder)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"another process trains in {folder}: end it, or wait until it has ended") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


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
        raise RunError(f"the disk is full ({error}): make room, then go on with {goes_on_by(folder)}") from error


@contextmanager
def unbroken() -> Iterator[None]:
    """The first signal that ends a run counts at the end of the block, a second one at once; only in the main thread.

    A second one is the same again, or Ctrl-C: a scheduler's SIGUSR1 is followed by SIGTERM in any case, and a terminal
    that is closed sends SIGHUP twice.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handlers = {signum: signal.getsignal(signum) for signum in (*STOPS, signal.SIGINT, LOST)}
    acts = {signum: handler for signum, handler in handlers.items() if callable(handler)}

    def hold(signum: int, frame: FrameType | None) -> None:
        again = signum in held and signum not in (signal.SIGHUP, LOST)
        held.append(signum)
        if again or (len(held) > 1 and signal.SIGINT in held):
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


def end_with_parent() -> None:
    """SIGTERM to this process once the one that started it with `multiprocessing` is gone, in whatever way."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
