"""The task's own score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from rlhf.rewards.failures import only_finite
from rlhf.rewards.samples import Rewards, Samples
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

    def begin(self, samples: Samples) -> Callable[[], Rewards]:
        """Their environments' scores, where those tell them."""
        environment = self.task.environment
        if environment is None or not environment.scores or samples.scores is None:
            return partial(self, samples.prompts, samples.answers)
        self.report = RewardReport()
        return partial(list, samples.scores)
