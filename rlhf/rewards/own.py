"""A reward that somebody else's part has made: what it returns is looked at as a user's function's is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.plugins.part import Part, PartError
from rlhf.rewards.failures import RAISED, as_rewards, lost, refuse_no_numbers
from rlhf.rewards.samples import Rewards
from rlhf.types import Prompt, Reward, RewardReport, Task
from transfer.agreement.shown import told


class OwnReward:
    """Numbers of any kind become rewards; whatever else is none, and counted.

    Samples for which it raises have none, and are counted, too; ValueError of another number of rewards than samples.
    """

    def __init__(self, chosen: str, function: Any) -> None:
        self.chosen, self.function = chosen, function
        self.report = RewardReport()

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Rewards:
        self.report = RewardReport()
        return [reward for given in self._asked(prompts, answers) for reward in given]

    def tried(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Rewards:
        """The same, which raises whatever the part raises, and ValueError of what is no number."""
        self.report = RewardReport()
        rewards = as_rewards(self.chosen, self.function(prompts, answers), len(answers), self.report)
        refuse_no_numbers(self.report)
        return rewards

    def _asked(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Iterator[Rewards]:
        """All at once; one by one, where that raises."""
        try:
            given = self.function(prompts, answers)
        except Exception as error:  # whatever the part raises
            if len(answers) > 1:
                for prompt, answer in zip(prompts, answers, strict=True):
                    yield from self._asked([prompt], [answer])
                return
            lost(self.report, RAISED, 1, f"{self.chosen} raised {told(error)}")
            yield [None]
            return
        yield as_rewards(self.chosen, given, len(answers), self.report)


def looked_at(part: Part, made: Any, task: Task) -> Reward:
    """The reward, if it rewards one row; one with a report of its own stays as it is. PartError says what is wrong."""
    if not callable(made):
        kind = type(made).__name__
        raise PartError(f"{part.chosen}: its maker must return a function of prompts and answers (got {kind})")
    own = None if hasattr(made, "report") else OwnReward(part.chosen, made)
    trial: Reward = made if own is None else own.tried
    try:
        trial(task.train[:1], [""] * len(task.train[:1]))
    except Exception as error:  # whatever the part raises
        raise PartError(f"{part.chosen} ({part.where}) fails on a trial of one row: {told(error)}") from error
    return made if own is None else own
