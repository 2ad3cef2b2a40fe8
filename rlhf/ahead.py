"""The samples of the step that comes next, drawn while this one is learned from (`rollout.ahead.lag=1`).

    step s      learn       push v(s)       learn of s + 1 ...
    sampling    of s + 1 -------^ waits     of s + 2 ...

So step s is sampled by the weights after step s - 2, exactly, however long anything takes: the push waits until the
samples are there. The same numbers in every run, for any number of workers, and after a resume: the samples of a step
that is not learned from yet are part of a checkpoint.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rlhf.gather import Gather, Scored
from rlhf.monitor.metrics import Recorder
from rlhf.ranks.frames import packed, unpacked
from rlhf.shell.ending import RunError
from rlhf.types import Completion, Prompt, RewardReport, Rollouts

FILE = "ahead.bin"  # of a checkpoint


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


class Ahead:
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

    def write(self, folder: Path, step: int) -> None:
        """Into a checkpoint after `step`: the samples of the next, if they are there."""
        future = self._batches.get(step + 1)
        if future is None or not future.done() or future.exception() is not None:
            return
        (rollouts, rewards), notes = future.result()
        numbers = {id(prompt): number for number, prompt in enumerate(self._prompts)}
        told = {
            "step": step + 1,
            "prompts": [numbers[id(prompt)] for prompt in rollouts.prompts],
            "rows": [[c.ids, c.logprobs, c.versions, c.finish_reason, c.sampled] for c in rollouts.completions],
            "texts": rollouts.texts,
            "seeds": rollouts.seeds,
            "n": rollouts.samples_per_prompt,
            "conversations": rollouts.conversations,
            "rewards": rewards,
            "sampled": notes.sampled,
            "seconds": notes.seconds,
            "reports": [asdict(report) for report in notes.reports],
        }
        (folder / FILE).write_bytes(packed(told))

    def close(self) -> None:
        """Draw no more; whoever waits for a worker that is about to end finds that."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, step: int) -> None:
        if step not in self._batches:
            self._batches[step] = self._pool.submit(self._draw, step)

    def _draw(self, step: int) -> Batch:
        notes = Notes()
        return replace(self._gather, record=notes)(self._prompts, self._order[step - 1], step), notes


def read(folder: Path, prompts: Sequence[Prompt]) -> tuple[int, Batch] | None:
    """The samples that a checkpoint has of the step after it; None: none. RunError if they make no sense."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        told = unpacked(path.read_bytes())
        rollouts = Rollouts(
            [prompts[number] for number in told["prompts"]],
            [Completion(*row) for row in told["rows"]],
            told["texts"],
            told["seeds"],
            told["n"],
            told["conversations"],
        )
        notes = Notes(told["sampled"], told["seconds"], [RewardReport(**each) for each in told["reports"]])
        return told["step"], ((rollouts, told["rewards"]), notes)
    except (ValueError, KeyError, TypeError, IndexError, struct.error) as error:
        raise RunError(f"{path}: it has no samples as a run has them: {type(error).__name__}: {error}") from error
