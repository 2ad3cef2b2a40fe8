"""The task's own score."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.types import Prompt, Task


class VerifierReward:
    """The task's own score."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        return [self.task.score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
