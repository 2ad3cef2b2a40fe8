"""Who starts the ranks beside the first: this process itself, here; torchrun, anywhere; or a Ray, on its hosts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from rlhf.ranks.torchrun import tell
from rlhf.shell.ending import RunError
from transfer.worker.process import WorkerProcess

LOOPBACK = "127.0.0.1"
CHILD = "rlhf.beside"  # the module that a rank beside the first runs


class Starter(Protocol):
    """Starts ranks 1, 2, ... by what each is to run (spec.py)."""

    @property
    def address(self) -> str:
        """At which these reach the first rank."""

    def start(self, specs: Sequence[str]) -> None:
        """All of them; they come meanwhile."""

    def check(self) -> None:
        """RunError if one of them has ended."""


class Processes:
    """Child processes of the first rank, whose logs go to `folder`; they end with the stack."""

    address = LOOPBACK

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._started: list[WorkerProcess] = []

    def start(self, specs: Sequence[str]) -> None:
        """All of them; they come meanwhile."""
        for number, spec in enumerate(specs, start=1):
            process = WorkerProcess(f"rank {number}", CHILD, spec, log_of(self._folder, number))
            self._started.append(self._stack.enter_context(process))

    def check(self) -> None:
        """RunError if one of them has ended."""
        for process in self._started:
            if not process.alive:
                raise ended(process.name, process.tail())


class Torchrun:
    """Processes that torchrun has started, and looks after."""

    @property
    def address(self) -> str:
        """Of the first rank's host, as torchrun has it."""
        return os.environ["MASTER_ADDR"]

    def start(self, specs: Sequence[str]) -> None:
        """Tell each what it is to run."""
        tell(specs)

    def check(self) -> None:
        """Nothing: torchrun ends all if one ends."""


def log_of(folder: Path, number: int) -> Path:
    """What a rank beside the first prints."""
    return folder / f"rank-{number}.log"


def ended(name: str, tail: str) -> RunError:
    """Of a rank that will not come."""
    return RunError(f"{name} of the trainer ended while it started; its log ends:\n{tail}")
