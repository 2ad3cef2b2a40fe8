"""Processes that a test has started: they are known by their folder, whatever else the machine does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil


def processes_in(folder: Path) -> Iterator[psutil.Process]:
    """All live processes in this folder, but this one."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has just ended
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                yield process


def living_in(folder: Path) -> list[str]:
    """Their command lines."""
    found = []
    for process in processes_in(folder):
        with suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return found
