"""What a reward is asked about, and how several rewards are asked at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf.types import Completion, Prompt, Reward, Rollouts

Rewards = list[float | None]


@dataclass(frozen=True, slots=True)
class Samples:
    """Prompts, an answer to each, and the answers' token ids where they are known."""

    prompts: Sequence[Prompt]
    answers: Sequence[str]
    ids: Sequence[list[int]] | None = None
    scores: Sequence[float | None] | None = None  # that their environments have told
    messages: Sequence[list[dict[str, Any]]] | None = None  # of conversations, all after the prompt

    @classmethod
    def of(cls, rollouts: Rollouts) -> Samples:
        """A step's; of a conversation, its last answer."""
        ids = [_last_answer(row) for row in rollouts.completions]
        scores = [told.score for told in rollouts.episodes] or None
        messages = [told.messages for told in rollouts.episodes] or None
        return cls(rollouts.prompts_B, rollouts.texts, ids, scores, messages)

    def part(self, places: Sequence[int]) -> Samples:
        """Those at these places."""
        prompts, answers = [self.prompts[place] for place in places], [self.answers[place] for place in places]
        given = (self.ids, self.scores, self.messages)
        others = [None if each is None else [each[place] for place in places] for each in given]
        return Samples(prompts, answers, *others)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.answers)

    def each(self) -> Iterator[Samples]:
        """One sample after the other."""
        for place in range(len(self)):
            yield self.part([place])


def begun(reward: Reward, samples: Samples) -> Callable[[], Rewards]:
    """Let the reward begin, if it can work while others do; what is returned waits for it."""
    begin = getattr(reward, "begin", None)
    return partial(reward, samples.prompts, samples.answers) if begin is None else begin(samples)


def rewarded(reward: Reward, rollouts: Rollouts) -> Rewards:
    """The rewards of a step's samples [B]; None where the environment has failed: no reward is asked about those."""
    samples, failed = Samples.of(rollouts), [bool(told.failed) for told in rollouts.episodes]
    if not any(failed):
        return begun(reward, samples)()
    played = [place for place, fell in enumerate(failed) if not fell]
    rewards: Rewards = [None] * len(samples)
    if played:
        for place, given in zip(played, begun(reward, samples.part(played))(), strict=True):
            rewards[place] = given
    return rewards


def _last_answer(row: Completion) -> list[int]:
    """The tokens after the last that the environment has said."""
    ids = row.ids.tolist()
    if row.sampled is None:
        return ids
    said = [place for place, ours in enumerate(row.sampled) if not ours]
    return ids[said[-1] + 1 :] if said else ids
