"""A reward that several threads ask: one after the other, since it need not know of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from rlhf.rewards.samples import Rewards, Samples, begun
from rlhf.types import Prompt, Reward, RewardReport


class RewardInTurn:
    """As `reward`, a call at a time; `report` is what it noted in the last call of the thread that asks."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._asked, self._noted = threading.Lock(), threading.local()

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Rewards:
        """As the reward's."""
        return self._ask(Samples(prompts, answers))

    def begin(self, samples: Samples) -> Callable[[], Rewards]:
        """Nothing of it is done before it is waited for."""
        return partial(self._ask, samples)

    @property
    def report(self) -> RewardReport | None:
        """As the reward's; None: it has none."""
        return getattr(self._noted, "report", None)

    def _ask(self, samples: Samples) -> Rewards:
        with self._asked:
            rewards = begun(self._reward, samples)()
            noted: RewardReport | None = getattr(self._reward, "report", None)
            told = None if noted is None else replace(noted, means=dict(noted.means), counts=dict(noted.counts))
            self._noted.report = told
        return rewards
