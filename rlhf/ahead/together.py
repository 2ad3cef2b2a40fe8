"""Rewards of many requests: what comes while the reward is being asked is asked for together, when that has ended.

Small requests would otherwise wait for each other: a judge that takes a second an answer, whoever asks, or a server.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rlhf.gather import Rewards, groups_of, joined
from rlhf.types import RewardReport, Rollouts

Rewarded = tuple[Rewards, RewardReport | None]


@dataclass(slots=True)
class Job:
    """The samples of one request, and what came of them."""

    rollouts: Rollouts
    rewarded: Rewarded | None = None
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether anything has come of them."""
        return self.rewarded is not None or self.error is not None


class Together:
    """Asks `reward` for one batch at a time, from any number of threads."""

    def __init__(self, reward: Callable[[Rollouts], Rewarded]) -> None:
        self._reward = reward
        self._asking, self._guard = threading.Lock(), threading.Lock()
        self._waiting: list[Job] = []

    def __call__(self, rollouts: Rollouts) -> Rewarded:
        """A reward for each of these samples, and what was noted; whatever the reward raises."""
        job = Job(rollouts)
        with self._guard:
            self._waiting.append(job)
        with self._asking:
            if not job.done:  # else another thread has asked for all that waited
                with self._guard:
                    jobs, self._waiting = self._waiting, []
                self._ask(jobs)
        if job.error is not None:
            raise job.error
        assert job.rewarded is not None
        return job.rewarded

    def _ask(self, jobs: Sequence[Job]) -> None:
        try:
            rewards, noted = self._reward(_batch(jobs))
        except BaseException as error:
            for job in jobs:
                job.error = error
            return
        report = None if noted is None else replace(noted, means=dict(noted.means), counts=dict(noted.counts))
        first = 0
        for job in jobs:
            rows = len(job.rollouts.completions)
            job.rewarded = rewards[first : first + rows], report
            first, report = first + rows, _means_alone(report)


def _batch(jobs: Sequence[Job]) -> Rollouts:
    if len(jobs) == 1:
        return jobs[0].rollouts
    return joined([group for job in jobs for group in groups_of((job.rollouts, []))])[0]


def _means_alone(report: RewardReport | None) -> RewardReport | None:
    """Of a report that several requests get: what is counted is counted once."""
    return None if report is None else replace(report, errors=None if report.errors is None else 0, error="", counts={})
