"""Several rewards as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rlhf.config.rules import named_as_part, of_part
from rlhf.monitor.metrics import mean
from rlhf.rewards.failures import only_finite
from rlhf.rewards.samples import Rewards, Samples, begun
from rlhf.types import Prompt, Reward, RewardReport


class WeightedSum:
    """sum_i w_i r_i over the parts, by name; None where any part has no reward.

    `report` has each part's mean over the samples that it rewarded, unweighted, and the errors and counts of all parts.
    """

    def __init__(self, parts: Mapping[str, tuple[float, Reward]]) -> None:
        self.parts = dict(parts)
        self.report = RewardReport()

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Rewards:
        return self.begin(Samples(prompts, answers))()

    def begin(self, samples: Samples) -> Callable[[], Rewards]:
        """Start on these samples those parts that can work while others do; what is returned gives the sums."""
        self.report = RewardReport()
        waiting = {name: begun(reward, samples) for name, (_, reward) in self.parts.items()}
        return partial(self._summed, samples, waiting)

    def _summed(self, samples: Samples, waiting: Mapping[str, Callable[[], Rewards]]) -> Rewards:
        totals: Rewards = [0.0] * len(samples)
        for name, (weight, reward) in self.parts.items():
            with named_as_part(name):
                values = waiting[name]()
            self._note(name, reward, values)
            totals = [
                None if total is None or value is None else total + weight * value
                for total, value in zip(totals, values, strict=True)
            ]
        return only_finite("reward=sum", totals, self.report)

    def _note(self, name: str, reward: Reward, values: Sequence[float | None]) -> None:
        average = mean(values)
        if average is not None:
            self.report.means[name] = average
        part: RewardReport | None = getattr(reward, "report", None)
        if part is None:
            return
        for befell, count in part.counts.items():
            self.report.counts[befell] = self.report.counts.get(befell, 0) + count
        if part.errors is not None:
            self.report.errors = (self.report.errors or 0) + part.errors
        self.report.error = self.report.error or of_part(name, part.error)
