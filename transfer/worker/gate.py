"""A lock that generation shares and a weight flip has alone; the flip goes first, and every wait has a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transfer.agreement import wire


class Gate:
    """Many inside at once through `shared`, or one through `exclusive`; Refused 503 when the deadline passes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._exclusive = 0  # inside or waiting: new sharers wait behind it
        self._held = False

    @property
    def sharing(self) -> int:
        """How many are inside through `shared`."""
        return self._sharing

    @property
    def idle(self) -> bool:
        """Whether nobody is inside, or waits."""
        return not self._sharing and not self._exclusive

    @property
    def wanted(self) -> bool:
        """Whether somebody waits to be alone."""
        return self._exclusive > 0

    @contextmanager
    def shared(self, timeout_s: float) -> Iterator[None]:
        """Wait until nobody has, or wants, the gate alone."""
        with self._changed:
            self._wait(lambda: not self._exclusive, timeout_s, "the weights are being replaced")
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    def give_way(self, timeout_s: float) -> None:
        """Inside `shared`: let whoever waits be alone, then go on; to be left with Refused 503 if that takes longer."""
        with self._changed:
            self._sharing -= 1
            self._changed.notify_all()
            try:
                self._wait(lambda: not self._exclusive, timeout_s, "the weights are being replaced")
            finally:
                self._sharing += 1

    @contextmanager
    def exclusive(self, timeout_s: float) -> Iterator[None]:
        """Keep newcomers out and wait until everybody inside is gone."""
        with self._changed:
            self._exclusive += 1
            try:
                self._wait(lambda: not self._sharing and not self._held, timeout_s, "completions are being generated")
                self._held = True
            except BaseException:
                self._leave()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._held = False
                self._leave()

    def _leave(self) -> None:
        self._exclusive -= 1
        self._changed.notify_all()

    def _wait(self, free: Callable[[], bool], timeout_s: float, why: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not free():
            if not self._changed.wait(deadline - time.monotonic()):
                raise wire.Refused(503, f"{why}, still after {timeout_s:g} s")
