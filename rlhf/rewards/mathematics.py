"""Whether an answer is, as mathematics, the reference's."""

from __future__ import annotations

import importlib.util
import queue
from collections.abc import Sequence

from rlhf.config import MathRewardConfig
from rlhf.rewards.at_once import begun
from rlhf.rewards.failures import RAISED, TIMED_OUT, lost
from rlhf.rewards.samples import Rewards
from rlhf.shell.apart import Apart, LateError, RaisedError
from rlhf.types import Amounts, Prompt, RewardReport
from transfer.agreement.shown import one_line

RIGHT = "rlhf.tasks.math_answers:right"
MEMORY = 4 * 2**30  # bytes that a hostile answer may ask for
TRIED = 8  # references before a run


class MathReward:
    """1.0 where the answer's last expression equals the reference's, else 0.0; None where there is no reference.

    Answers are compared in `concurrency` processes; one that has not come to an end within `timeout_s`, or in which
    math-verify raises, has no reward and is counted in `report`, and its process is killed.
    """

    def __init__(self, config: MathRewardConfig) -> None:
        self.config = config
        self.report = RewardReport(errors=0)
        self._idle: queue.SimpleQueue[Apart] = queue.SimpleQueue()
        for _ in range(config.concurrency):
            self._idle.put(Apart(RIGHT, MEMORY))

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Rewards:
        self.report = report = RewardReport(errors=0)
        references = [prompt.columns.get(self.config.answer_column) for prompt in prompts]
        told = begun(self._compared, list(zip(references, answers, strict=True)), self.config.concurrency)()
        for each in told:
            if isinstance(each, LateError):
                what = f"has not compared an answer within reward.timeout_s={self.config.timeout_s:g} seconds"
                lost(report, TIMED_OUT, 1, f"reward=math {what}")
            elif isinstance(each, RaisedError):
                lost(report, RAISED, 1, f"reward=math: {one_line(str(each), 300)}")
        return [None if isinstance(each, Exception) else each for each in told]

    def close(self) -> None:
        """End the processes; the next call starts others."""
        for _ in range(self.config.concurrency):
            apart = self._idle.get()
            apart.close()
            self._idle.put(apart)

    def _compared(self, pair: tuple[object, str]) -> float | Exception | None:
        reference, answer = pair
        if not isinstance(reference, str):
            return None
        apart = self._idle.get()
        try:
            return float(apart(reference, answer, timeout_s=self.config.timeout_s))
        except (LateError, RaisedError) as error:
            return error
        finally:
            self._idle.put(apart)


def check_math(config: MathRewardConfig, task: Amounts) -> None:
    """ValueError without math-verify, or where the task's rows have no reference that it can read."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("reward=math needs the package math-verify: pip install -e '.[math]'")
    column = config.answer_column
    there = [row for row in task.train if isinstance(row.columns.get(column), str)]
    if not there:
        known = sorted({name for row in task.train for name in row.columns})
        raise ValueError(
            f"reward=math needs references to compare with, and no row has a text in {column!r} "
            f"(reward.answer_column); the task's columns are {', '.join(known) or 'none'}"
        )
    reward = MathReward(config)
    try:
        reward([Prompt("", (), row.columns) for row in there[:TRIED]], ["0"] * len(there[:TRIED]))
    finally:
        reward.close()
    if reward.report.errors == len(there[:TRIED]):
        raise ValueError(f"{reward.report.error}: {column!r} (reward.answer_column) must hold numbers or expressions")
