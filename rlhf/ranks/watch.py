"""Every rank notices within moments that another is gone, whatever it waits for: its life connection ends.

The first rank takes note why, tells the others, and interrupts itself as Ctrl-C would, whatever it does. A rank beside
it has nothing to put in order and ends at once: a GPU's collective that waits for a rank that is gone would never end.
"""

from __future__ import annotations

import multiprocessing.connection as mp
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

from rlhf.ranks.frames import packed, unpacked
from rlhf.ranks.star import Star, ended
from rlhf.shell.ending import LOST

LOOK_S = 0.2  # until the thread sees that it is to end
GRACE_S = 1.0  # in which the first rank comes upon the error itself, or ends for a reason of its own


class Gone(KeyboardInterrupt):
    """Raised in the first rank's main thread: another rank is gone."""


class Watch:
    """A thread that looks after the other ranks' life connections; `cause` says why the run cannot go on."""

    def __init__(self, star: Star, number: int) -> None:
        self._star, self._number = star, number
        self._over, self._noticed = threading.Event(), threading.Event()
        self._before: Any = None  # what LOST did; None: it does nothing here
        self.cause: str | None = None
        if number == 0 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(LOST, self._raise)
        self._thread = threading.Thread(target=self._look, name="ranks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more: from now on others may go."""
        self._over.set()
        self._thread.join()
        if self._before is not None:
            signal.signal(LOST, self._before)
            self._before = None

    def why(self, wait_s: float) -> str | None:
        """Why another rank is gone, if one is; a broken collective may be known sooner than its reason."""
        self._noticed.wait(wait_s)
        return self.cause

    def give_up(self, reason: str) -> None:
        """Tell the first rank why this one ends."""
        with suppress(OSError):
            self._star.life[0].send_bytes(packed(reason))

    def _look(self) -> None:
        while not self._over.is_set():
            if gone := ended(self._star.life, LOOK_S):
                if not self._over.is_set():
                    self._lost(gone[0])
                return

    def _lost(self, connection: mp.Connection) -> None:
        if self._number:
            with suppress(OSError):
                print("the trainer's first rank has ended: so does this one", file=sys.stderr, flush=True)
            os._exit(1)
        self.cause = _reason(connection, self._star.life.index(connection) + 1)
        self._noticed.set()
        self._star.shut()
        while not self._over.wait(GRACE_S) and self._before is not None:
            signal.pthread_kill(threading.main_thread().ident or 0, LOST)

    def _raise(self, signum: int, frame: FrameType | None) -> None:
        if not self._over.is_set() and sys.exc_info()[0] is None:  # else it ends already, or is about to go on
            raise Gone


def _reason(connection: mp.Connection, number: int) -> str:
    """What a rank has said before it ended."""
    try:
        return str(unpacked(connection.recv_bytes()))
    except (OSError, EOFError, ValueError):
        return f"rank {number} of the trainer has ended without a word: was it killed, or out of memory?"
