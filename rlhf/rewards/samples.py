"""What a reward is asked about, and how several rewards are asked at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from rlhf.types import Completion, Prompt, Reward, Rollouts

Rewards = list[float | None]


@dataclass(frozen=True, slots=True)
class Samples:
    """Prompts, an answer to each, and the answers' token ids where they are known."""

    prompts: Sequence[Prompt]
    answers: Sequence[str]
    ids: Sequence[list[int]] | None = None

    @classmethod
    def of(cls, rollouts: Rollouts) -> Samples:
        """A step's; of a conversation, its last answer."""
        return cls(rollouts.prompts_B, rollouts.texts, [_last_answer(row) for row in rollouts.completions])

    def __len__(self) -> int:
        return len(self.answers)

    def each(self) -> Iterator[Samples]:
        """One sample after the other."""
        for place, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True)):
            yield Samples([prompt], [answer], None if self.ids is None else [self.ids[place]])


def begun(reward: Reward, samples: Samples) -> Callable[[], Rewards]:
    """Let the reward begin, if it can work while others do; what is returned waits for it."""
    begin = getattr(reward, "begin", None)
    return partial(reward, samples.prompts, samples.answers) if begin is None else begin(samples)


def rewarded(reward: Reward, rollouts: Rollouts) -> Rewards:
    """The rewards of a step's samples [B]."""
    return begun(reward, Samples.of(rollouts))()


def _last_answer(row: Completion) -> list[int]:
    """The tokens after the last that the environment has said."""
    ids = row.ids.tolist()
    if row.sampled is None:
        return ids
    said = [place for place, ours in enumerate(row.sampled) if not ours]
    return ids[said[-1] + 1 :] if said else ids
