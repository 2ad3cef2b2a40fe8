"""A chat model as the judge: a request a sample, and the number that its answer ends with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rlhf.config import JudgeRewardConfig
from rlhf.rewards import at_once
from rlhf.rewards.columns import names
from rlhf.rewards.failures import NOT_A_NUMBER, lost
from rlhf.rewards.post import Answer, FailedError, Post, words
from rlhf.rewards.samples import Rewards, Samples
from rlhf.types import Amounts, Prompt, RewardReport
from transfer.agreement.shown import shown

OWN = ("prompt", "completion", "lowest", "highest")
PLACE = re.compile(r"\{(\w+)\}")
NUMBER = re.compile(r"[\s*]*([-+]?(?:\d+(?:\.\d*)?|\.\d+))(?![\d.]*\d)")


class JudgeReward:
    """The score that a chat model gives a prompt's answer; None, and a count in `report`, where it gives none in time.

    `concurrency` requests are under way at once. Of a conversation the judge reads each message with its role.
    """

    def __init__(self, config: JudgeRewardConfig) -> None:
        self.config = config
        self._post = Post(config)
        self.report = RewardReport()

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Rewards:
        return self.begin(Samples(prompts, answers))()

    def begin(self, samples: Samples) -> Callable[[], Rewards]:
        """Ask; what is returned waits for the scores."""
        self.report = report = RewardReport(errors=0)
        bodies = [self._body(prompt, answer) for prompt, answer in zip(samples.prompts, samples.answers, strict=True)]
        return partial(self._scores, at_once.begun(self._post, bodies, self.config.concurrency), report)

    def check(self) -> None:
        """RunError if nothing listens where the requests will go."""
        self._post.check()

    def _body(self, prompt: Prompt, answer: str) -> bytes:
        config = self.config
        asked = {
            "model": config.model,
            "messages": [{"role": "user", "content": filled(config, prompt, answer)}],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        return json.dumps(asked).encode()

    def _scores(self, answers: Callable[[], list[Answer | FailedError]], report: RewardReport) -> Rewards:
        rewards: Rewards = []
        for answer in answers():
            try:
                rewards.append(self._score(answer))
            except FailedError as error:
                lost(report, error.what, 1, str(error))
                rewards.append(None)
        return rewards

    def _score(self, answer: Answer | FailedError) -> float:
        if isinstance(answer, FailedError):
            raise answer
        config = self.config
        try:
            said = json.loads(answer.body)["choices"][0]["message"]["content"] or ""
            _, mark, behind = said.rpartition(config.score_after)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise self._post.broken(NOT_A_NUMBER, f"answered what is no chat completion: {words(answer)}") from None
        found = NUMBER.match(behind) if mark else None
        if found is None or not config.lowest <= float(found[1]) <= config.highest:
            raise self._post.broken(
                NOT_A_NUMBER,
                f"gave no number from {config.lowest:g} to {config.highest:g} behind {config.score_after!r} "
                f"(reward.score_after), but {shown(said[-200:], 200)}",
            )
        return float(found[1])


def check_judge(config: JudgeRewardConfig, task: Amounts) -> None:
    """ValueError where the template names what no row has, RunError where no server is."""
    known = [*OWN, *names(task.train)]
    if missing := [name for name in PLACE.findall(config.template) if name not in known]:
        raise ValueError(
            f"reward.template has {{{missing[0]}}} in it, and there are {', '.join(known)}: name a column of the task"
        )
    JudgeReward(config).check()


def filled(config: JudgeRewardConfig, prompt: Prompt, answer: str) -> str:
    """The template for one sample; what is put into it is not looked into."""
    own = {
        "prompt": _read(prompt),
        "completion": answer,
        "lowest": f"{config.lowest:g}",
        "highest": f"{config.highest:g}",
    }
    values: dict[str, Any] = {**prompt.columns, **own}
    return PLACE.sub(lambda place: str(values.get(place[1], "")), config.template)


def _read(prompt: Prompt) -> str:
    if not prompt.messages:
        return prompt.text
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
