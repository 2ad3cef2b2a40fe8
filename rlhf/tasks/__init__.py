"""Prompts and how an answer is scored.

In two steps, because the tiny model's tokenizer is made from the task's own characters: `read_task` gives texts, and
`make_task` renders and tokenises them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rlhf.config import (
    ArithmeticTaskConfig,
    GuessTaskConfig,
    JsonlTaskConfig,
    ReasoningGymTaskConfig,
    ReverseTaskConfig,
    SortTaskConfig,
    TaskConfig,
)
from rlhf.tasks.chat import Chat, Message, dated
from rlhf.tasks.encoding import beginning, begun
from rlhf.tasks.json_lines import counted, report
from rlhf.types import Environment, Pair, Prompt, Task, Tokenizer
from transfer.agreement.shown import shown

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
class RawTask:
    """A task before there is a tokenizer."""

    train: list[Row]
    held_out: list[Row]
    gold: Gold
    replies: Replies | None = None  # None: one answer a prompt
    notes: Sequence[str] = ()  # what a user should know of the data, a line each

    @property
    def conversational(self) -> bool:
        """Whether questions are messages, which need a chat template."""
        return any(not isinstance(row.question, str) for row in self._rows)

    @property
    def _rows(self) -> list[Row]:
        return [*self.train, *self.held_out]

    def tags(self) -> list[str]:
        """What messages are marked with, sorted: roles, and keys of messages and of what their template is given."""
        return sorted({tag for row in self._rows for tag in row.tags()})

    def characters(self) -> list[str]:
        """Every character of the task's texts, sorted."""
        said = self.replies.characters if self.replies is not None else ""
        return sorted(set(said).union(*(text for row in self._rows for text in row.texts())))


@dataclass(slots=True)
class TokenisedTask:
    """A task that a policy can be asked; held-out rows give no demonstrations and no preferences."""

    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    demonstrations: Sequence[tuple[Prompt, str]]
    preferences: Sequence[Pair]
    gold: Gold
    environment: Environment | None = None
    notes: Sequence[str] = ()  # what a user should know of the data, a line each

    def score(self, prompt: Prompt, answer: str) -> float | None:
        """The gold reward in [0, 1], or None where the data hold no reference."""
        return self.gold(prompt.columns, answer)


@dataclass(frozen=True, slots=True)
class TokenisedReplies:
    """An `Environment` around a task's replies."""

    replies: Replies
    tokenizer: Tokenizer

    @property
    def turns(self) -> int:
        """Answers of a conversation, at most."""
        return self.replies.turns

    @property
    def longest_reply(self) -> int:
        """Tokens."""
        return len(self.encode(self.replies.longest))

    def reply(self, prompt: Prompt, answers: Sequence[str]) -> str | None:
        """What is said after these answers; None where the conversation is over."""
        return self.replies.reply(prompt.columns, answers) if len(answers) < self.replies.turns else None

    def encode(self, reply: str) -> list[int]:
        """The reply's tokens, as they stand: no chat template is put around them."""
        return self.tokenizer.encode(reply, add_special_tokens=False)


def read_task(config: TaskConfig, seed: int) -> RawTask:
    """The task's texts, the same for the same seed; ValueError if they cannot be had."""
    match config:
        case SortTaskConfig() | ReverseTaskConfig():
            from rlhf.tasks.procedural import sequence_task

            return sequence_task(config, seed)
        case ArithmeticTaskConfig():
            from rlhf.tasks.procedural import arithmetic_task

            return arithmetic_task(config, seed)
        case GuessTaskConfig():
            from rlhf.tasks.guess import guess_task

            return guess_task(config, seed)
        case ReasoningGymTaskConfig():
            from rlhf.tasks.reasoning_gym import reasoning_gym_task

            return reasoning_gym_task(config, seed)
        case JsonlTaskConfig():
            from rlhf.tasks.jsonl import jsonl_task

            return jsonl_task(config, seed)
    raise AssertionError(f"no task is made from {type(config).__name__}")


def make_task(raw: RawTask, tokenizer: Tokenizer, moment: datetime | None = None) -> Task:
    """Render conversations with the tokenizer's chat template, and tokenise prompts as it does itself.

    A template that asks for the date is told that of `moment`; None: today's. ValueError with all rows of which no
    prompt or no answer can be made.
    """
    maker = _Maker(tokenizer, Chat(tokenizer) if raw.conversational else None)
    with dated(tokenizer, moment if raw.conversational else None):
        rows = maker.all([*raw.train, *raw.held_out])
    train = rows[: len(raw.train)]
    return TokenisedTask(
        train=[row.prompt for row in train],
        held_out=[row.prompt for row in rows[len(raw.train) :]],
        demonstrations=[demonstration for row in train for demonstration in row.demonstrations],
        preferences=[row.preference for row in train if row.preference is not None],
        gold=raw.gold,
        environment=TokenisedReplies(raw.replies, tokenizer) if raw.replies is not None else None,
        notes=[*raw.notes, *maker.notes()],
    )


@dataclass(frozen=True, slots=True)
class _TokenisedRow:
    prompt: Prompt
    demonstrations: list[tuple[Prompt, str]]
    preference: Pair | None


@dataclass(slots=True)
class _Maker:
    """Makes rows for a model."""

    tokenizer: Tokenizer
    chat: Chat | None  # None: all questions are texts
    start: list[int] = field(init=False)
    ties: list[str] = field(default_factory=list)  # where a pair's answers are the same as the template renders them

    def __post_init__(self) -> None:
        self.start = beginning(self.tokenizer)

    def notes(self) -> Iterator[str]:
        """What was left out of the rows."""
        if self.chat is not None and self.chat.unseen:
            unseen = ", ".join(map(shown, self.chat.unseen))
            yield f"warning: the model's chat template leaves these keys of messages out: {unseen}"
        if self.ties:
            yield f"warning: pairs of answers that the chat template renders alike are left out: {counted(self.ties)}"

    def all(self, rows: Iterable[Row]) -> list[_TokenisedRow]:
        """The rows; ValueError with all those of which nothing can be made."""
        made, bad = [], []
        for row in rows:
            try:
                made.append(self._row(row))
            except ValueError as error:
                bad.append((row.where, str(error)))
        if bad:
            raise ValueError(report(bad, len(made)))
        return made

    def _row(self, row: Row) -> _TokenisedRow:
        longest = row.longest
        prompt = self._prompt(row, row.question, look=row.question is longest)
        demonstrations = (
            [] if row.demonstration is None else [(prompt, self._answer(row, row.question, row.demonstration))]
        )
        demonstrations += [
            (self._prompt(row, asked, look=asked is longest), self._answer(row, asked, answer))
            for asked, answer in row.turns
        ]
        pair = None
        if row.preference is not None:
            chosen, rejected = (self._answer(row, row.question, answer) for answer in row.preference)
            pair = Pair(prompt, chosen, rejected) if chosen != rejected else None
            self.ties += [row.where] if pair is None else []
        return _TokenisedRow(prompt, demonstrations, pair)

    def _prompt(self, row: Row, question: str | list[Message], look: bool) -> Prompt:
        messages = [] if isinstance(question, str) else question
        text = question if isinstance(question, str) else self._chat.asked(question, row.given, look)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise ValueError(f"the model's tokenizer makes no token of the prompt {shown(text)}: leave that prompt out")
        given = row.given if messages else {}
        return Prompt(text, tuple(begun(ids, self.start, bool(messages))), row.columns, messages, given, row.where)

    def _answer(self, row: Row, question: str | list[Message], answer: Answer) -> str:
        if isinstance(answer, str) or isinstance(question, str):
            assert isinstance(answer, str), "what is more than a text answers messages"
            return answer
        return self._chat.answer(question, row.given, answer)

    @property
    def _chat(self) -> Chat:
        assert self.chat is not None, "messages are asked"
        return self.chat
