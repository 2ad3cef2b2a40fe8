"""A task as a policy is asked: conversations rendered by the tokenizer's chat template, prompts as token ids."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from rlhf.environments.make import environment_of
from rlhf.models.encoding import beginning, begun
from rlhf.tasks.chat import Chat, Message, dated
from rlhf.tasks.json_lines import counted, report
from rlhf.tasks.raw import Answer, Gold, RawTask, Replies, Row
from rlhf.types import TIMED_OUT, Completion, Environment, Pair, Prompt, Said, Task, Then, Tokenizer
from transfer.agreement.shown import shown


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
    """An `Environment` around a task's replies, which are asked for one after the other, whoever does."""

    replies: Replies
    tokenizer: Tokenizer
    places: None = None
    budget: int | None = None
    timeout_s: float | None = None
    scores: bool = False
    opens: bool = False
    asked: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> TokenisedReplies:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is held."""

    @property
    def turns(self) -> int:
        """Answers of a conversation, at most."""
        return self.replies.turns

    @property
    def longest_reply(self) -> int:
        """Tokens."""
        return len(self.encode(self.replies.longest))

    def episode(self, prompt: Prompt) -> RepliesEpisode:
        """One of its own for a row with this prompt."""
        return RepliesEpisode(self, prompt)

    def reply(self, prompt: Prompt, answers: Sequence[str]) -> str | None:
        """What is said after these answers; None where the conversation is over."""
        with self.asked:
            return self.replies.reply(prompt.columns, answers)

    def encode(self, reply: str) -> list[int]:
        """The reply's tokens, as they stand: no chat template is put around them."""
        return self.tokenizer.encode(reply, add_special_tokens=False)


@dataclass(slots=True)
class RepliesEpisode:
    """A row's: it knows the answers so far, and replies at once."""

    environment: TokenisedReplies
    prompt: Prompt
    answers: list[str] = field(default_factory=list)

    def begin(self, then: Then) -> None:
        """Nothing is said before the first answer."""
        then(Said(ids=()))

    def hear(self, answer: Completion, text: str, then: Then) -> None:
        """The reply to the answers so far."""
        self.answers.append(text)
        last = len(self.answers) == self.environment.turns
        reply = None if last else self.environment.reply(self.prompt, self.answers)
        then(Said() if reply is None else Said(self.environment.encode(reply), reply))

    def end(self, then: Then) -> None:
        """It has no score: the task's own is of the last answer."""
        then(Said())

    def close(self) -> None:
        """Nothing is held."""


def tried(environment: Environment, prompt: Prompt, chosen: str) -> None:
    """ValueError unless an episode with this prompt can begin; `chosen`: what has made the environment."""
    if not environment.opens:
        return
    heard, episode = queue.SimpleQueue[Said](), environment.episode(prompt)
    try:
        episode.begin(heard.put)
        said = heard.get(timeout=environment.timeout_s)
    except queue.Empty:
        said = Said(failed=TIMED_OUT, why=f"no answer within {environment.timeout_s:g} s (task.timeout_s)")
    finally:
        episode.close()
    if said.failed:
        raise ValueError(f"{chosen} fails on the first row, before anything is trained: {said.failed}: {said.why}")


def _environment(raw: RawTask, tokenizer: Tokenizer) -> Environment | None:
    """What answers the policy, if anything does."""
    if raw.stage is not None:
        return environment_of(raw.stage.config, raw.stage.factory, tokenizer, raw.conversational)
    if raw.surroundings is not None:
        return raw.surroundings(tokenizer)
    return None if raw.replies is None else TokenisedReplies(raw.replies, tokenizer)


def make_task(raw: RawTask, tokenizer: Tokenizer, moment: datetime | None = None) -> Task:
    """Render conversations with the tokenizer's chat template, and tokenise prompts as it does itself.

    A template that asks for the date is told that of `moment`; None: today's. ValueError with all rows of which no
    prompt or no answer can be made.
    """
    raw = _with_tools(raw)
    maker = _Maker(tokenizer, Chat(tokenizer) if raw.conversational else None)
    with dated(tokenizer, moment if raw.conversational else None):
        rows = maker.all([*raw.train, *raw.held_out])
    train, held_out = rows[: len(raw.train)], rows[len(raw.train) :]
    longest: list[str] = []
    if raw.longest_prompt is not None:
        train, held_out, longest = _short(train, held_out, raw.longest_prompt)
    return TokenisedTask(
        train=[row.prompt for row in train],
        held_out=[row.prompt for row in held_out],
        demonstrations=[demonstration for row in train for demonstration in row.demonstrations],
        preferences=[row.preference for row in train if row.preference is not None],
        gold=raw.gold,
        environment=_environment(raw, tokenizer),
        notes=[*raw.notes, *_unnamed(raw, tokenizer), *maker.notes(), *longest],
    )


def _with_tools(raw: RawTask) -> RawTask:
    """The rows, each of which is given the tools of the stage, if the policy is to be shown them."""
    if raw.stage is None or raw.stage.factory.plays or not raw.stage.config.show_tools:
        return raw
    tools = raw.stage.factory.schemas()
    train, held_out = (
        [replace(row, given={**row.given, "tools": tools}) for row in rows] for rows in (raw.train, raw.held_out)
    )
    return replace(raw, train=train, held_out=held_out)


def _short(
    train: list[_TokenisedRow], held_out: list[_TokenisedRow], longest: int
) -> tuple[list[_TokenisedRow], list[_TokenisedRow], list[str]]:
    """The rows whose prompt has at most `longest` tokens, and what is to be said of the others."""
    kept, left = ([row for row in rows if len(row.prompt.ids) <= longest] for rows in (train, held_out))
    for rows, short, purpose in ((train, kept, "to train on"), (held_out, left, "to hold out")):
        if not short:
            least = min(len(row.prompt.ids) for row in rows)
            raise ValueError(
                f"task.longest_prompt={longest} leaves no prompt {purpose}: the shortest has {least} tokens"
            )
    gone = [row.prompt.where for row in (*train, *held_out) if len(row.prompt.ids) > longest]
    held = f", {len(held_out) - len(left)} of them held out" if len(left) < len(held_out) else ""
    told = f"task.longest_prompt={longest} leaves out rows with longer prompts: {counted(gone)}{held}"
    return kept, left, [told] if gone else []


def _unnamed(raw: RawTask, tokenizer: Tokenizer) -> Iterator[str]:
    """Arguments for all rows of which the chat template knows nothing: jinja takes any, and says nothing."""
    text = str(getattr(tokenizer, "chat_template", None))
    if other := [name for name in raw.template if not re.search(rf"\b{re.escape(name)}\b", text)]:
        yield f"warning: the model's chat template does not use {', '.join(map(shown, other))} of task.template"


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
