"""The task's own score."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.rewards.failures import only_finite
from rlhf.types import Prompt, RewardReport, Task


class VerifierReward:
    """The task's own score."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.report = RewardReport()

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        self.report = RewardReport()
        scores = [self.task.score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return only_finite("reward=verifier", scores, self.report)
