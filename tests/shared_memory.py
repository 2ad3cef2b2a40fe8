"""What is left in /dev/shm by processes that have ended."""

from __future__ import annotations

import os
import time
from pathlib import Path


def left_in_shared_memory(before: set[str], within_s: float, alone: bool = False) -> set[str]:
    """New names in /dev/shm after so many seconds; unless it is ours `alone`, those that nobody has open any more."""
    deadline = time.monotonic() + within_s
    while left := set(os.listdir("/dev/shm")) - before:
        left = left if alone else {name for name in left if not _held(f"/dev/shm/{name}")}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)
    return set()


def _held(path: str) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if path in (process / "maps").read_text():
                return True
            if any(os.readlink(fd) == path for fd in (process / "fd").iterdir()):
                return True
        except OSError:
            continue  # it has ended, or is not ours
    return False
