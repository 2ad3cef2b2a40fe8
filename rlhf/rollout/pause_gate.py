"""Pausing: completions that may start, and messages that wait until those under way have ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transfer.agreement.wire import Refused

PAUSE_S = 300.0  # how long `pause` waits for running completions to end
MAX_PAUSES = 4  # messages that wait for it at once; each keeps a thread
PAUSE_MODES = ("abort", "wait", "keep")  # of completions that run: cut short, waited for, neither


class PauseGate:
    """Lets completions in, or keeps new ones out while the worker is paused."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._waiting = 0  # in `pause`
        self._mode: str | None = None

    @property
    def paused(self) -> bool:
        """Whether new completions are refused."""
        return self._mode is not None

    def aborting(self) -> bool:
        """Whether running completions should end early."""
        return self._mode == "abort"

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Hold while a completion runs; Refused 503 while paused."""
        with self._changed:
            if self.paused:
                raise Refused(503, "the worker is paused: resume it first")
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def pause(self, mode: str) -> None:
        """Close the gate and, unless `mode` is "keep", wait until nothing runs; Refused 503 after PAUSE_S seconds.

        At once if MAX_PAUSES others wait for it.
        """
        with self._changed:
            if mode != "keep" and self._running and self._waiting == MAX_PAUSES:
                raise Refused(503, f"{MAX_PAUSES} messages wait already until completions have ended: no more may")
            self._mode = mode
            self._waiting += 1
            try:
                ended = mode == "keep" or self._changed.wait_for(lambda: self._running == 0, PAUSE_S)
            finally:
                self._waiting -= 1
            if not ended:
                raise Refused(503, f"paused, but {self._running} completions still run after {PAUSE_S:.0f} s")

    def resume(self) -> None:
        """Open the gate."""
        with self._changed:
            self._mode = None
