"""A task as texts: what is read or generated, before there is a tokenizer."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.config.task import EnvironmentTaskConfig
from rlhf.environments.factory import Factory
from rlhf.tasks.chat import Message
from rlhf.types import Environment, Tokenizer

Answer = str | Message  # a text, or an assistant's message with more than that, which the chat template renders
Gold = Callable[[Mapping[str, Any], str], float | None]  # (a row's columns, an answer) -> score in [0, 1]


@dataclass(frozen=True, slots=True)
class Row:
    """One question, as text or as messages, and what the data know about its answer."""

    question: str | list[Message]
    columns: Mapping[str, Any]
    demonstration: Answer | None = None
    preference: tuple[Answer, Answer] | None = None  # (chosen, rejected)
    given: Mapping[str, Any] = field(default_factory=dict)  # the chat template's arguments beside messages: tools, ...
    turns: Sequence[tuple[list[Message], Answer]] = ()  # the row's other demonstrations, of an answer in several turns
    where: str = ""  # file and line

    @property
    def longest(self) -> str | list[Message]:
        """The longest that is asked; all else that is asked is its beginning."""
        return max((self.question, *(asked for asked, _ in self.turns)), key=len)

    def texts(self) -> list[str]:
        """Every text of the row that a model may read or write."""
        return [text for said in (*self._said(), *self.given.values()) for text in _texts(said)]

    def tags(self) -> Iterator[str]:
        """What its messages are marked with: roles, and what else they hold; nothing of a text."""
        for message in self._said():
            if isinstance(message, dict):
                yield from (message["role"], *(message.keys() - {"role", "content"}))
        yield from self.given

    def _said(self) -> Iterator[Answer | None]:
        """What is asked, and each answer."""
        asked = self.longest
        yield from [asked] if isinstance(asked, str) else asked
        yield from (self.demonstration, *(self.preference or ()), *(answer for _, answer in self.turns))


def _texts(said: Any) -> Iterator[str]:
    """The texts of an answer, of a message, or of what a template is given: JSON, if it is neither."""
    match said:
        case None:
            return
        case str():
            yield said
        case {"role": _, "content": content, **others}:
            yield content
            for other in others.values():
                yield from _texts(other)
        case _:
            yield json.dumps(said, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Replies:
    """What answers the policy: (a row's columns, the answers so far) -> a text of `characters`; None: it is over."""

    turns: int  # answers of a conversation, at most
    reply: Callable[[Mapping[str, Any], Sequence[str]], str | None]
    longest: str
    characters: str


@dataclass(frozen=True, slots=True)
class Stage:
    """A user's class, of which each row gets an instance."""

    config: EnvironmentTaskConfig
    factory: Factory


@dataclass(frozen=True, slots=True)
class RawTask:
    """A task before there is a tokenizer."""

    train: list[Row]
    held_out: list[Row]
    gold: Gold
    replies: Replies | None = None  # None: one answer a prompt
    notes: Sequence[str] = ()  # what a user should know of the data, a line each
    stage: Stage | None = None  # an environment of a user's class
    surroundings: Callable[[Tokenizer], Environment] | None = None  # another environment
    longest_prompt: int | None = None  # tokens: rows with a longer one are left out
    template: Mapping[str, Any] = field(
        default_factory=dict
    )  # of what rows are given, what the configuration gives all

    @property
    def conversational(self) -> bool:
        """Whether questions are messages, which need a chat template."""
        return any(not isinstance(row.question, str) for row in self._rows)

    @property
    def _rows(self) -> list[Row]:
        return [*self.train, *self.held_out]

    @property
    def demonstrations(self) -> list[Answer]:
        """Answers to learn from, of the rows that are trained on."""
        first = [row.demonstration for row in self.train if row.demonstration is not None]
        return first + [answer for row in self.train for _, answer in row.turns]

    @property
    def preferences(self) -> list[tuple[Answer, Answer]]:
        """Pairs of answers, (better, worse), of the rows that are trained on."""
        return [row.preference for row in self.train if row.preference is not None]

    def score(self, row: Row, answer: str) -> float | None:
        """The gold reward in [0, 1], or None where the data hold no reference."""
        return self.gold(row.columns, answer)

    def tags(self) -> list[str]:
        """What messages are marked with, sorted: roles, and keys of messages and of what their template is given."""
        calls = self.surroundings is not None or (self.stage is not None and not self.stage.factory.plays)
        tools = ("tools", "tool_calls", "tool") if calls else ()
        return sorted({tag for row in self._rows for tag in row.tags()}.union(tools))

    def characters(self) -> list[str]:
        """Every character of the task's texts, sorted."""
        any_text = self.stage is not None or self.surroundings is not None
        said = self.replies.characters if self.replies is not None else string.printable if any_text else ""
        return sorted(set(said).union(*(text for row in self._rows for text in row.texts())))
