"""What is left in /dev/shm by processes that have ended."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path


def left_in_shared_memory(
    before: set[str], within_s: float, alone: bool = False, ours: Collection[int] = ()
) -> set[str]:
    """New names in /dev/shm after so many seconds; unless it is ours `alone`, those that no process has open any more
    but these of `ours`."""
    deadline = time.monotonic() + within_s
    while left := set(os.listdir("/dev/shm")) - before:
        left = left if alone else {name for name in left if not _held(f"/dev/shm/{name}", ours)}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)
    return set()


def _held(path: str, ours: Collection[int]) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) in ours:
            continue
        try:
            if path in (process / "maps").read_text():
                return True
            if any(os.readlink(fd) == path for fd in (process / "fd").iterdir()):
                return True
        except OSError:
            continue  # it has ended, or is not ours
    return False
