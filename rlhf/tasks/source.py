"""Where a task's rows come from, one by one; and what the screen shows where reading them takes longer."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rlhf.tasks.json_lines import Record
from transfer.agreement.shown import printable

EVERY_S = 2.0  # seconds until a line is printed, and between two of them


def _none() -> list[str]:
    return []


@dataclass(frozen=True, slots=True)
class Source:
    """Rows that are read once, in their order."""

    name: str
    key: str  # that chose it
    records: Iterator[Record]
    wanted: str = "a file with one JSON object a line"
    notes: Callable[[], list[str]] = _none  # what is to be said of it, once it is read


@dataclass(slots=True)
class Seen:
    """How far the reading is."""

    rows: int = 0


@contextmanager
def reading(name: str) -> Iterator[Seen]:
    """Until the block is left, a line is printed every EVERY_S seconds."""
    seen, over = Seen(), threading.Event()

    def tell() -> None:
        seconds = 0.0
        while not over.wait(EVERY_S):
            seconds += EVERY_S
            rows = f"{seen.rows:,} rows, " if seen.rows else ""
            print(printable(f"reading {name}: {rows}{seconds:.0f} s"), file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True, name="reading")
    teller.start()
    try:
        yield seen
    finally:
        over.set()
        teller.join()
