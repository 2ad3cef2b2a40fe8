"""Several rewards as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf.config.rules import named_as_part, of_part
from rlhf.monitor.metrics import mean
from rlhf.types import Prompt, Reward, RewardReport


class WeightedSum:
    """sum_i w_i r_i over the parts, by name; None where any part has no reward.

    `report` has each part's mean over the samples that it rewarded, unweighted, and the errors and counts of all parts.
    """

    def __init__(self, parts: Mapping[str, tuple[float, Reward]]) -> None:
        self.parts = dict(parts)
        self.report = RewardReport()

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        self.report = RewardReport()
        totals: list[float | None] = [0.0] * len(answers)
        for name, (weight, reward) in self.parts.items():
            with named_as_part(name):
                values = reward(prompts, answers)
            self._note(name, reward, values)
            totals = [
                None if total is None or value is None else total + weight * value
                for total, value in zip(totals, values, strict=True)
            ]
        return totals

    def _note(self, name: str, reward: Reward, values: Sequence[float | None]) -> None:
        average = mean(values)
        if average is not None:
            self.report.means[name] = average
        part = getattr(reward, "report", None)
        for befell, count in part.counts.items() if part is not None else ():
            self.report.counts[befell] = self.report.counts.get(befell, 0) + count
        if part is not None and part.errors is not None:
            self.report.errors = (self.report.errors or 0) + part.errors
            self.report.error = self.report.error or of_part(name, part.error)
