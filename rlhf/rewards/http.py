"""The user's server: texts by POST, rewards as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.config import HttpRewardConfig
from rlhf.rewards import at_once
from rlhf.rewards.columns import columns
from rlhf.rewards.failures import NOT_A_NUMBER, as_rewards, lost
from rlhf.rewards.post import Answer, FailedError, Post, words
from rlhf.rewards.samples import Rewards, Samples
from rlhf.shell.ending import RunError
from rlhf.types import Prompt, RewardReport


@dataclass(frozen=True, slots=True)
class Batch:
    """One request: its body, and how many rewards answer it."""

    body: bytes
    samples: int


class HttpReward:
    """POSTs {"prompts": [...], "completions": [...], "columns": {name: [...]}}, reads {"rewards": [number | null]}.

    So many requests at once as `concurrency` says. The samples of a request that has no answer within `timeout_s`, or
    another than that, have no reward, and are counted in `report`, as are NaN, infinity and what is no number.
    """

    def __init__(self, config: HttpRewardConfig) -> None:
        self.config = config
        self._post = Post(config)
        self.report = RewardReport()

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Rewards:
        return self.begin(Samples(prompts, answers))()

    def begin(self, samples: Samples) -> Callable[[], Rewards]:
        """Send the requests; what is returned waits for the rewards. RunError where columns are no JSON."""
        self.report = report = RewardReport(errors=0)
        batches, size = [], self.config.batch_size
        for start in range(0, len(samples), size):
            part = slice(start, start + size)
            batches.append(self._batch(samples.prompts[part], samples.answers[part]))
        answers = at_once.begun(lambda batch: self._post(batch.body), batches, self.config.concurrency)
        return lambda: [reward for each in zip(batches, answers(), strict=True) for reward in self._read(*each, report)]

    def check(self) -> None:
        """RunError if nothing listens where the requests will go; waits for it as they do, and sends nothing."""
        self._post.check()

    def _batch(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Batch:
        asked = {
            "prompts": [prompt.text for prompt in prompts],
            "completions": list(answers),
            "columns": columns(prompts),
        }
        try:
            return Batch(json.dumps(asked, allow_nan=False).encode(), len(answers))
        except (TypeError, ValueError) as error:
            raise RunError(
                f"reward.url={self.config.url} takes JSON, which a column of the task is not: {error}"
            ) from None

    def _read(self, batch: Batch, answer: Answer | FailedError, report: RewardReport) -> Rewards:
        """The rewards of a request; None of each, and a count, where it has failed."""
        try:
            if isinstance(answer, FailedError):
                raise answer
            try:
                given = json.loads(answer.body)["rewards"]
            except (ValueError, TypeError, KeyError, RecursionError):
                raise self._post.broken(
                    NOT_A_NUMBER, f'must answer {{"rewards": [...]}} (got {words(answer)})'
                ) from None
            return as_rewards(f"reward.url={self.config.url}", given, batch.samples, report)
        except FailedError as error:
            lost(report, error.what, batch.samples, str(error))
        except ValueError as error:  # another number of rewards
            lost(report, NOT_A_NUMBER, batch.samples, str(error))
        return [None] * batch.samples
