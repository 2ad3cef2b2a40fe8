"""While a thread of the trainer may read its weights: whoever wants to change them ends that first, and then knows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Hold:
    """Begins when it is made; `end` returns when nobody reads, and nobody will."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what reads the weights; ConnectionAbortedError if the trainer has gone on."""
        with self._lock:
            if self._over:
                raise ConnectionAbortedError("the trainer has gone on: its weights may be others by now")
            yield

    def end(self) -> None:
        """The weights may change once this has returned."""
        with self._lock:
            self._over = True
