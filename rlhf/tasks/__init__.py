"""Prompts and how an answer is scored.

In two steps, because the tiny model's tokenizer is made from the task's own characters: `read_task` gives texts, and
`make_task` renders and tokenises them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from types import SimpleNamespace
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
from rlhf.types import Environment, Pair, Prompt, Task, Tokenizer
from transfer.shown import shown

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Gold = Callable[[Mapping[str, Any], str], float | None]  # (a row's columns, an answer) -> score in [0, 1]


@dataclass(frozen=True, slots=True)
class Row:
    """One question, as text or as messages that end with the user's, and what the data know about its answer."""

    question: str | list[Message]
    columns: Mapping[str, Any]
    demonstration: str | None = None
    preference: tuple[str, str] | None = None  # (chosen, rejected)

    def texts(self) -> list[str]:
        """Every text of the row that a model may read or write."""
        asked = [self.question] if isinstance(self.question, str) else [turn["content"] for turn in self.question]
        answers = [self.demonstration] if self.demonstration is not None else []
        return [*asked, *answers, *(self.preference or ())]


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

    @property
    def conversational(self) -> bool:
        """Whether questions are messages, which need a chat template."""
        return any(not isinstance(row.question, str) for row in self.train)

    def characters(self) -> list[str]:
        """Every character of the task's texts, sorted."""
        rows = [*self.train, *self.held_out]
        said = self.replies.characters if self.replies is not None else ""
        return sorted({character for row in rows for text in row.texts() for character in text} | set(said))


@dataclass(slots=True)
class TokenisedTask:
    """A task that a policy can be asked; held-out rows give no demonstrations and no preferences."""

    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    demonstrations: Sequence[tuple[Prompt, str]]
    preferences: Sequence[Pair]
    gold: Gold
    environment: Environment | None = None

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
    """Render conversations with the tokenizer's chat template, and tokenise without adding special tokens.

    A template that asks for the date is told that of `moment`; None: today's.
    """
    dated = raw.conversational and "strftime_now" in str(getattr(tokenizer, "chat_template", None))
    with _told(moment) if dated and moment is not None else nullcontext():
        return _tokenised(raw, tokenizer)


@contextmanager
def _told(moment: datetime) -> Iterator[None]:
    """Chat templates' `strftime_now` is about this moment: transformers takes no function in place of its own."""
    from transformers.utils import chat_template_utils as templates

    real = templates.datetime
    templates.datetime = SimpleNamespace(now=lambda: moment)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        templates.datetime = real  # type: ignore[misc]


def _tokenised(raw: RawTask, tokenizer: Tokenizer) -> Task:
    train = [_prompt(row, tokenizer) for row in raw.train]
    pairs = list(zip(train, raw.train, strict=True))
    return TokenisedTask(
        train=train,
        held_out=[_prompt(row, tokenizer) for row in raw.held_out],
        demonstrations=[(prompt, row.demonstration) for prompt, row in pairs if row.demonstration is not None],
        preferences=[Pair(prompt, *row.preference) for prompt, row in pairs if row.preference is not None],
        gold=raw.gold,
        environment=TokenisedReplies(raw.replies, tokenizer) if raw.replies is not None else None,
    )


def _prompt(row: Row, tokenizer: Tokenizer) -> Prompt:
    messages = [] if isinstance(row.question, str) else row.question
    text = row.question if isinstance(row.question, str) else _rendered(row.question, tokenizer)
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise ValueError(f"the model's tokenizer makes no token of the prompt {shown(text)}: leave that prompt out")
    return Prompt(text, ids, row.columns, messages)


def _rendered(messages: list[Message], tokenizer: Tokenizer) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):  # a checkpoint's tokenizer has one, or None
        raise ValueError(
            "the data are conversations, and the model's tokenizer has no chat template: choose a chat model "
            "(model.path), or a file whose prompts are texts (task.path)"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(
            f"the model's chat template refuses a conversation ({error}): {shown(messages, 300)}"
        ) from None
