"""Conversations: answers of the policy and replies of an environment in turns, each row as one string of tokens.

An answer goes back to the workers as the prompt of the next one, as the very token ids that were sampled, with the
reply's behind them: a worker sees a completion like any other, and nothing is ever tokenised twice.

    prompt | answer EOS | reply | answer EOS | reply | answer EOS        mask 0 on replies: nobody learns to say them
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from rlhf.rollout.client import RolloutClient
from rlhf.rollout.sampling import seed_of
from rlhf.types import (
    FINISHED,
    IDS,
    LOGPROBS,
    SAMPLED,
    VERSIONS,
    Completion,
    Environment,
    Prompt,
    Rollouts,
    column,
)

SAMPLES = 65536  # more than there are samples a prompt: apart from each other are the seeds of turns


@dataclass(slots=True)
class Row:
    """One conversation so far."""

    prompt: Prompt
    seeds: list[int]  # of its turns after the first
    last: Completion
    said: list[str]  # answer, reply, answer, ...
    ids: array[int] = field(default_factory=partial(array, IDS))
    logprobs: array[float] | None = None  # as those of its first answer: of all its answers, or of none
    versions: array[int] = field(default_factory=partial(array, VERSIONS))
    sampled: array[int] = field(default_factory=partial(array, SAMPLED))

    def __post_init__(self) -> None:
        self.logprobs = None if self.last.logprobs is None else array(LOGPROBS)
        self._take(self.last)

    @property
    def measured(self) -> bool:
        """Whether its answers have log-probs."""
        return self.logprobs is not None

    def _take(self, answer: Completion) -> None:
        self.last = answer
        self._add(answer.ids, answer.logprobs, answer.versions, 1)

    def hear(self, reply: str, ids: Sequence[int]) -> None:
        """The environment's turn."""
        self.said.append(reply)
        said = column(IDS, ids)
        self._add(said, array(LOGPROBS, (0.0,)) * len(said), self.last.versions[-1:] * len(said), 0)

    def _add(self, ids: array[int], logprobs: array[float] | None, versions: array[int], sampled: int) -> None:
        self.ids.extend(ids)
        if self.logprobs is not None and logprobs is not None:
            self.logprobs.extend(logprobs)
        self.versions.extend(versions)
        self.sampled.extend(array(SAMPLED, (sampled,)) * len(ids))

    def say(self, answer: Completion, text: str) -> None:
        """The policy's turn."""
        self.said.append(text)
        self._take(answer)

    def completion(self) -> Completion:
        """All of it as one completion."""
        return Completion(self.ids, self.logprobs, self.versions, self.last.finish_reason, self.sampled)


class Conversations:
    """Samples conversations; a `rlhf.types.Sampler`. An answer that the length limit has cut ends its conversation."""

    def __init__(self, client: RolloutClient, environment: Environment) -> None:
        self._client = client
        self._environment = environment

    def sample(self, prompts: Sequence[Prompt], *, n: int, temperature: float, seed: int) -> Rollouts:
        """Draw n conversations a prompt; each depends on its own seeds alone."""
        return self.sample_seeded(prompts, [seed_of(seed, index) for index in range(len(prompts))], n, temperature)

    def sample_seeded(self, prompts: Sequence[Prompt], seeds: list[int], n: int, temperature: float) -> Rollouts:
        """As `sample` does, with a seed of its own for each prompt."""
        first = self._client.sample_seeded(prompts, seeds, n, temperature)
        turns = range(1, self._environment.turns)
        rows = [
            Row(prompt, [seed_of(first.seeds[b // n], turn * SAMPLES + b % n) for turn in turns], answer, [text])
            for b, (prompt, answer, text) in enumerate(
                zip(first.prompts_B, first.completions, first.texts, strict=True)
            )
        ]
        going = rows
        for turn in range(len(turns)):
            going = [row for row in going if row.last.finish_reason == FINISHED and self._replied(row)]
            if not going:
                break
            asked = [[*row.prompt.ids, *row.ids] for row in going]
            seeds, measured = [row.seeds[turn] for row in going], [b for b, row in enumerate(going) if row.measured]
            answers = self._client.complete(asked, seeds, 1, temperature, measured)
            for row, answer, text in zip(going, answers, self._client.texts(answers), strict=True):
                row.say(answer, text)
        completions, texts = [row.completion() for row in rows], [row.said[-1] for row in rows]
        return Rollouts(list(prompts), completions, texts, first.seeds, n, [row.said for row in rows])

    def _replied(self, row: Row) -> bool:
        """Whether the environment has said something, which the row then holds."""
        reply = self._environment.reply(row.prompt, row.said[::2])
        if reply is None:
            return False
        row.hear(reply, self._environment.encode(reply))
        return True


def conversing(client: RolloutClient, environment: Environment | None) -> RolloutClient | Conversations:
    """The client itself where answers are not replied to, else conversations through it."""
    return client if environment is None else Conversations(client, environment)
