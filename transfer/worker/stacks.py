"""The stacks of a process that does not answer: upon SIGUSR1 it writes those of all its threads, and goes on."""

from __future__ import annotations

import faulthandler
import signal
import sys
from pathlib import Path

DUMP = signal.SIGUSR1
VARIABLE = "RLHF_STACKS"  # for processes that a worker's engine starts: the log that they write them into


def dumps_stacks_when_asked(log: Path | str | None = None) -> None:
    """To be called by the process; it writes them at the end of `log`, or to its stderr."""
    file = sys.stderr if log is None else open(log, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the process lives
    faulthandler.register(DUMP, file=file, all_threads=True)
