"""The samples of the step that comes next, drawn while this one is learned from, in exact order.

    step s      learn       push v(s)       learn of s + 1 ...
    sampling    of s + 1 -------^ waits     of s + 2 ...

So step s is sampled by the weights after step s - 2, exactly, however long anything takes: the push waits until the
samples are there. The same numbers in every run, for any number of workers, and after a resume: the samples of a step
that is not learned from yet are part of a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.ahead import kept
from rlhf.ahead.kept import heard, heard_reports, told, told_reports, written
from rlhf.gather import Gather, Scored
from rlhf.monitor.metrics import Recorder
from rlhf.types import Prompt, RewardReport


@dataclass(slots=True)
class Notes:
    """What is measured while a step is sampled, for the recorder to hear when the step is learned from."""

    sampled: int = 0
    seconds: float = 0.0
    reports: list[RewardReport] = field(default_factory=list)

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside, if samples are drawn there."""
        began = time.monotonic()
        yield
        if phase == "sample":
            self.seconds += time.monotonic() - began

    def rewarded(self, report: RewardReport) -> None:
        """One of the step's calls of the reward is done."""
        self.reports.append(replace(report, means=dict(report.means), counts=dict(report.counts)))


Batch = tuple[Scored, Notes]  # of one step


class Exact:
    """`gather` for the steps in their `order`, each begun when the one before it is taken; a context.

    In the first rank alone. `batch`: of the step that is taken first, if it was drawn before (`read`).
    """

    def __init__(
        self,
        gather: Gather,
        record: Recorder,
        prompts: Sequence[Prompt],
        order: Sequence[Sequence[int]],
        batch: tuple[int, Batch] | None = None,
    ) -> None:
        self._gather, self._record = gather, record
        self._prompts, self._order = prompts, order
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._batches: dict[int, Future[Batch]] = {}  # of the step that is learned from, and of the next
        if batch is not None:
            step, drawn = batch
            self._batches[step] = Future()
            self._batches[step].set_result(drawn)

    def __call__(self, train: Sequence[Prompt], rows: Sequence[int], step: int) -> Scored:
        """The samples of the step and their rewards; those of the next are begun."""
        self._begin(step)
        with self._record.time("sample"):
            scored, notes = self._batches[step].result()
        self._batches = {step: self._batches[step]}
        if step < len(self._order):
            self._begin(step + 1)
        self._record.sampled += notes.sampled
        self._record.sampling_s = notes.seconds
        for report in notes.reports:
            self._record.rewarded(report)
        return scored

    def settle(self) -> None:
        """Wait until the weights that are live may be replaced: nothing is drawn with them any more."""
        for future in self._batches.values():
            future.result()

    def release(self) -> None:
        """Nothing waits for that."""

    def write(self, folder: Path, step: int) -> None:
        """Into a checkpoint after `step`: the samples of the next, if they are there."""
        future = self._batches.get(step + 1)
        if future is None or not future.done() or future.exception() is not None:
            return
        scored, notes = future.result()
        numbers = {id(prompt): number for number, prompt in enumerate(self._prompts)}
        reports = told_reports(notes.reports)
        also = {"step": step + 1, "sampled": notes.sampled, "seconds": notes.seconds, "reports": reports}
        written(folder, told(scored, numbers) | also)

    def close(self) -> None:
        """Draw no more; whoever waits for a worker that is about to end finds that."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, step: int) -> None:
        if step not in self._batches:
            self._batches[step] = self._pool.submit(self._draw, step)

    def _draw(self, step: int) -> Batch:
        notes = Notes()
        return replace(self._gather, record=notes)(self._prompts, self._order[step - 1], step), notes


def read(folder: Path, prompts: Sequence[Prompt], later: int = 0) -> tuple[int, Batch] | None:
    """The samples that a checkpoint has of the step after it; None: none. RunError if they make no sense.

    `later`: as versions have other numbers now.
    """

    def batch(said: Any) -> tuple[int, Batch]:
        notes = Notes(said["sampled"], said["seconds"], heard_reports(said["reports"]))
        return said["step"], (heard(said, prompts, later), notes)

    return kept.read(folder, False, batch)
