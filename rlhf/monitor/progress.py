"""What the screen shows during a run: a bar a stage with the few numbers that matter; lines without a terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rlhf.monitor.heartbeat import Pulse
from rlhf.shell.screen import plain_console
from transfer.agreement.shown import printable

TRANSFER_LOG = logging.getLogger("transfer")
LINE_EVERY_S = 2.0  # without a terminal: seconds between two lines of one stage


class Stage:
    """One stage's bar; `advance` after each step."""

    def __init__(self, bars: Bars, name: str, total: int, done: int = 0) -> None:
        self.bars, self.name, self.total, self.done = bars, name, total, done
        self.shown = time.monotonic()
        bars.pulse.at(name, done, total, {})
        self.task: TaskID | None = None
        if bars.progress is not None:
            self.task = bars.progress.add_task(name, total=total, completed=done, numbers="")

    def advance(self, numbers: Mapping[str, float] | None = None) -> None:
        """One step is done; `numbers` stand beside the bar."""
        self.done += 1
        self.bars.pulse.at(self.name, self.done, self.total, numbers or {})
        text = "  ".join(f"{name} {value:.4g}" for name, value in (numbers or {}).items())
        if self.bars.progress is not None and self.task is not None:
            self.bars.progress.update(self.task, advance=1, numbers=text)
        elif self.bars.on and (time.monotonic() - self.shown > LINE_EVERY_S or self.done == self.total):
            self.shown = time.monotonic()
            self.bars.console.print(f"{self.name} {self.done}/{self.total}  {text}", highlight=False)


class Bars:
    """All stages of a run; a context manager, as a live display must be ended."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self.console = plain_console()
        self.pulse = Pulse()
        self.progress: Progress | None = None
        self._warnings = Warnings(self)

    def __enter__(self) -> Bars:
        TRANSFER_LOG.addHandler(self._warnings)
        if self.on and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description:<13}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        TRANSFER_LOG.removeHandler(self._warnings)
        if self.progress is not None:
            self.progress.stop()

    def stage(self, name: str, total: int, done: int = 0) -> Stage:
        """A new stage of `total` steps, some of which may be done."""
        return Stage(self, name, total, done)

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """A stage of one step whose end nobody can tell."""
        stage = self.stage(name, 1)
        start = time.monotonic()
        with self.pulse.within(name):
            yield
        stage.advance({"seconds": round(time.monotonic() - start, 1)})

    def say(self, text: str) -> None:
        """One line above the bars."""
        if self.on:
            self.console.print(printable(text), highlight=False, soft_wrap=True)


class Warnings(logging.Handler):
    """What the package `transfer` warns of, as lines above the bars."""

    def __init__(self, bars: Bars) -> None:
        super().__init__(logging.WARNING)
        self._bars = bars

    def emit(self, record: logging.LogRecord) -> None:
        """Show one warning."""
        self._bars.say(f"warning: {record.getMessage()}")
