"""While a thread of the trainer may read its weights: whoever wants to change them ends that first, and then knows.

`Holds` names the newest one for threads of the same process that were told the name only, in an endpoint.
"""

from __future__ import annotations

import secrets
import threading
import weakref
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


class Holds:
    """One hold after the other, of a publisher with this `name`."""

    def __init__(self) -> None:
        self.name = secrets.token_hex(8)
        self.newest = Hold()
        _named[self.name] = self

    def renew(self) -> None:
        """The weights are held still from now on; who has read others before is none of it."""
        self.newest.end()
        self.newest = Hold()


def newest(name: str) -> Hold:
    """The newest hold of the publisher with this name; LookupError if it is not in this process."""
    return _named[name].newest


_named: weakref.WeakValueDictionary[str, Holds] = weakref.WeakValueDictionary()
