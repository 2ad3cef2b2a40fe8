"""Python's garbage collector, which rests for as long as anybody in the process asks it to."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()  # a finalizer may ask, too
_asking = 0  # how many ask it to rest
_was = False  # whether it worked before the first of them


def rest() -> None:
    """Nothing is collected until `go_on` has been called as often as this, by whatever threads."""
    global _asking, _was
    with _lock:
        if not _asking:
            _was = gc.isenabled()
            gc.disable()
        _asking += 1


def go_on() -> None:
    """The end of one `rest`; with the last one's the collector is as it was before the first."""
    global _asking
    with _lock:
        _asking -= 1
        if not _asking and _was:
            gc.enable()


def collect_alone() -> None:
    """Collect once in the middle of a `rest`, unless others ask for it, too, or the collector did not work before."""
    with _lock:
        if _asking == 1 and _was:
            gc.collect()


@contextmanager
def uncollected() -> Iterator[None]:
    """A `rest` for a block."""
    rest()
    try:
        yield
    finally:
        go_on()
