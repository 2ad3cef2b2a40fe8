"""`python kills.py FOLDER random N | each`: processes that do nothing but save are killed, and what they leave is read.

One JSON line says what came of it: how many kills there were, how many of them in the middle of a save, and how often
the loader found the step that was being saved, or the one before; anything else is an error. Imports no torch, so that
200 processes take seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from nth_fault import Nth, failing

from rlhf.checkpoint.store import WRITING, Best, Store

LONGEST_S = 0.012  # of life after the first save has begun; a save takes a few milliseconds


def content(step: int) -> dict[str, bytes]:
    """What a checkpoint of this step holds; no two steps have a file in common."""
    return {f"{name}.bin": bytes([step % 251]) * (1000 + 7 * step % 5000) for name in ("policy/weights", "optimizer")}


def save(store: Store, step: int) -> None:
    def write(folder: Path) -> None:
        (folder / "policy").mkdir()
        for name, data in content(step).items():
            (folder / name).write_bytes(data)

    store.save(step, write)
    store.note_best(Best(step, float(step)))
    store.keep_only(store.steps()[-2:])


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """A process that does `work` with the writing end of a pipe; its id, and the reading end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            work(writing)
        finally:
            os._exit(0)
    os.close(writing)
    return pid, reading


def savings(folder: Path, first: int, steps: int, writing: int) -> None:
    """Save one step after the other, and tell when each has begun and ended."""
    store = Store(folder)
    for step in range(first, first + steps):
        os.write(writing, f"begin {step}\n".encode())
        save(store, step)
        os.write(writing, f"end {step}\n".encode())


def looked_at(folder: Path, reading: int, before: int | None, seen: Counter[str]) -> int | None:
    """What the loader returns after the process is gone: the step being saved, or the one before, whole."""
    with os.fdopen(reading) as pipe:
        told = [line.split() for line in pipe.read().splitlines()]
    ended = max([int(step) for what, step in told if what == "end"], default=before)
    begun = max([int(step) for what, step in told if what == "begin"], default=ended)
    newest = Store(folder).newest()
    seen["in a save"] += any(folder.glob(f"{WRITING}*"))
    if newest not in (ended, begun):
        sys.exit(f"the loader returned {newest}, of a process that had saved {ended} and was saving {begun}")
    if newest is not None:
        found = {name: (Store(folder).path(newest) / name).read_bytes() for name in content(newest)}
        assert found == content(newest), newest
    seen["k-1" if newest != begun else "k"] += 1
    return newest


def at_random(folder: Path, count: int) -> Counter[str]:
    """`count` processes, each killed at a random moment and followed by one that goes on where it was."""
    draw, seen, newest = random.Random(0), Counter[str](), None
    os.fsync = lambda descriptor: None  # a killed process loses nothing that the kernel has
    for _ in range(count):
        first = 0 if newest is None else newest + 1
        pid, reading = forked(lambda writing, first=first: savings(folder, first, 10**6, writing))  # type: ignore[misc]
        time.sleep(draw.uniform(0.0, LONGEST_S))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen["kills"] += 1
        newest = looked_at(folder, reading, newest, seen)
    return seen


def at_each_call(folder: Path) -> Counter[str]:
    """A process that ends at its n-th call that changes the disk, for n = 1, 2, ... until it comes to its end."""
    seen, newest, n = Counter[str](), None, 0
    while True:
        n += 1
        nth, first = Nth(n, lambda name: os._exit(9)), 0 if newest is None else newest + 1

        def dies(writing: int, nth: Nth = nth, first: int = first) -> None:
            with failing(nth):
                savings(folder, first, 2, writing)

        pid, reading = forked(dies)
        _, status = os.waitpid(pid, 0)
        newest = looked_at(folder, reading, newest, seen)
        if os.waitstatus_to_exitcode(status) == 0:
            return seen
        seen["kills"] += 1


if __name__ == "__main__":
    place = Path(sys.argv[1])
    print(json.dumps(at_random(place, int(sys.argv[3])) if sys.argv[2] == "random" else at_each_call(place)))
