"""One conversation so far, as one string of tokens.

    prompt | answer EOS | reply | answer EOS | reply | answer EOS        mask 0 on replies: nobody learns to say them

An answer goes back to the workers as the prompt of the next one, as the very token ids that were sampled, with the
reply's behind them: a worker sees a completion like any other, and nothing is ever tokenised twice.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rlhf.types import FINISHED, IDS, LOGPROBS, SAMPLED, VERSIONS, Completion, Episode, Prompt, Said, Told, column


@dataclass(slots=True, eq=False)
class Row:
    """A prompt's sample number `sample`, which has heard and said so much."""

    number: int  # in the step
    prompt: Prompt
    sample: int
    episode: Episode
    own: tuple[int, ...] | None = None  # its prompt, where the environment has said what it is
    said: list[str] = field(default_factory=list)  # answer, reply, answer, ...
    messages: list[dict[str, Any]] = field(default_factory=list)  # the same, with calls of tools
    ids: array[int] = field(default_factory=partial(array, IDS))
    logprobs: array[float] | None = None  # as those of its first answer: of all its answers, or of none
    versions: array[int] = field(default_factory=partial(array, VERSIONS))
    sampled: array[int] = field(default_factory=partial(array, SAMPLED))
    finish_reason: str = FINISHED
    answers: int = 0
    score: float | None = None
    failed: str = ""
    why: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    over: bool = False
    calls: int = 0  # of its episode; what an older one tells comes too late
    deadline: float | None = None  # of the call that runs

    @property
    def asks_with(self) -> list[int]:
        """The prompt of its next answer."""
        return [*(self.prompt.ids if self.own is None else self.own), *self.ids]

    def tokens_with(self, said: Said) -> int:
        """Of the prompt of its next answer, once it has heard that."""
        own = said.prompt or self.own or self.prompt.ids
        return len(own) + len(self.ids) + len(said.ids or ())

    def say(self, answer: Completion, text: str) -> None:
        """The policy's turn."""
        if not self.answers:
            begun = len(self.ids)
            self.logprobs = None if answer.logprobs is None else array(LOGPROBS, (0.0,)) * begun
            self.versions = array(VERSIONS, answer.versions[:1]) * begun
        self.answers += 1
        self.said.append(text)
        self.messages.append({"role": "assistant", "content": text})
        self.finish_reason = answer.finish_reason
        self._add(answer.ids, answer.logprobs, answer.versions, 1)

    def hear(self, said: Said) -> None:
        """The environment's turn."""
        ids = column(IDS, said.ids or ())
        self.own = self.own if said.prompt is None else said.prompt
        self.note(said)
        if self.answers:
            self.said.append(said.text)
        self._add(ids, array(LOGPROBS, (0.0,)) * len(ids), self.versions[-1:] * len(ids), 0)

    def note(self, said: Said) -> None:
        """What was heard and said, as messages."""
        if said.answer is not None:
            self.messages[-1] = dict(said.answer)
        self.messages += map(dict, said.messages)

    def end(self, said: Said) -> None:
        """It is over, or has failed."""
        self.over, self.score, self.failed, self.why = True, said.score, said.failed, said.why

    @property
    def text(self) -> str:
        """The last answer."""
        return self.said[2 * (self.answers - 1)] if self.answers else ""

    def told(self) -> Told:
        """What it was, beside its tokens."""
        replied = any(message["role"] != "assistant" or len(message) > 2 for message in self.messages)
        messages = self.messages if replied else []
        return Told(self.said or [""], self.score, self.failed, dict(self.counts), self.why, messages)

    def completion(self, version: int, end: int) -> Completion:
        """All of it; of a row that has failed before its first answer a token `end` of that version, with mask 0."""
        if not self.answers:
            said = array(IDS, (end,)), None, array(VERSIONS, (version,))
            return Completion(*said, FINISHED, array(SAMPLED, (0,)))
        own = None if self.own == self.prompt.ids else self.own
        return Completion(self.ids, self.logprobs, self.versions, self.finish_reason, self.sampled, own)

    def _add(self, ids: Sequence[int], logprobs: Sequence[float] | None, versions: Sequence[int], sampled: int) -> None:
        self.ids.extend(ids)
        if self.logprobs is not None and logprobs is not None:
            self.logprobs.extend(logprobs)
        self.versions.extend(versions)
        self.sampled.extend(array(SAMPLED, (sampled,)) * len(ids))
