"""Conversations as texts, by the chat template of the model's tokenizer: what is asked, and what answers.

Nothing of a conversation is left out in silence. Where the template shows no sign of a message, a call, the tools or an
answer's reasoning, ValueError; other keys that it leaves out are in `unseen`.

Templates want a call's arguments in one of two spellings, and both are tried: an object (transformers'), or JSON text
(OpenAI's).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from rlhf.models.chat_template import RefusedError, behind_an_answer, rendered
from rlhf.types import Tokenizer
from transfer.agreement.shown import shown

Message = dict[str, Any]  # role, content, and what else the chat template may render
Spelling = Callable[[Message], Message]

CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "reasoning", "thinking")
SPOKEN = (*CALLS, *REASONING)  # what an assistant may say beside `content`
NAMES = ("role", "content", "name", "tool_call_id", "id")  # the template's to show or not
LEAVES_OUT = "the model's chat template does not render"
ANOTHER = "take a model whose template does (model.path)"


@contextmanager
def dated(tokenizer: Tokenizer, moment: datetime | None) -> Iterator[None]:
    """Chat templates' `strftime_now` is about this moment: transformers takes no function in place of its own."""
    if moment is None or "strftime_now" not in str(getattr(tokenizer, "chat_template", None)):
        yield
        return
    from transformers.utils import chat_template_utils as templates

    real = templates.datetime
    templates.datetime = SimpleNamespace(now=lambda: moment)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        templates.datetime = real  # type: ignore[misc]


def before_answer(messages: Sequence[Any]) -> tuple[Sequence[Any], str]:
    """The messages that are to be answered, and the text with which the answer begins where it has been begun."""
    if messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, ""


@dataclass(slots=True)
class Chat:
    """A tokenizer's chat template; ValueError where it has none, refuses a conversation, or leaves something out."""

    tokenizer: Tokenizer
    unseen: dict[str, None] = field(default_factory=dict)  # other keys of messages that the template leaves out
    _looked_at: set[str] = field(default_factory=set)
    _tail: str | None = None

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):  # a checkpoint's tokenizer has one, or None
            raise ValueError(
                "the data are conversations, and the model's tokenizer has no chat template: choose a chat model "
                "(model.path), or a file whose prompts are texts (task.path; with task.system or task.chat all are "
                "conversations)"
            )

    def asked(self, messages: Sequence[Message], given: Mapping[str, Any], look: bool = True) -> str:
        """The text that the policy is asked with; `given` are other arguments of the template, like `tools`.

        If the assistant's message is the last one, its answer goes on from there. Without `look`, nobody looks for what
        the template leaves out: of conversations that one begins with, say.
        """
        messages, begun = before_answer(messages)

        def attempt(spelling: Spelling) -> str:
            spelt = list(map(spelling, messages))
            text = self._rendered(spelt, given, ask=True)
            if look:
                self._check_tools(spelt, given, text)
                seen = self._seen(spelt, range(len(spelt)), given, text, ask=True)
                for place in range(len(spelt)):
                    self._check(spelt, place, given, text, seen, ask=True)
            return text

        return in_a_spelling(messages, attempt) + begun

    def answer(self, messages: Sequence[Message], given: Mapping[str, Any], answer: Message) -> str:
        """The text by which the policy would answer `messages` with this message, without the end of its turn.

        Of a message that the template renders as its text alone, that is the text.
        """
        plain = {"role": answer["role"], "content": answer["content"]}

        def attempt(spelling: Spelling) -> str:
            spelt = list(map(spelling, [*messages, answer]))
            asked, whole = self._rendered(spelt[:-1], given, ask=True), self._rendered(spelt, given, ask=False)
            seen = self._seen(spelt, [len(messages)], given, whole, ask=False)
            self._check(spelt, len(messages), given, whole, seen, ask=False)
            if not seen and whole == self._rendered([*spelt[:-1], plain], given, ask=False):
                return answer["content"]
            if not whole.startswith(asked):
                raise ValueError(
                    f"the model's chat template asks with ...{asked[-60:]!r}, and the answer {shown(answer, 200)} is "
                    "rendered in another way: set chat_template_kwargs in the row, or give the answer as a text"
                )
            return whole.removeprefix(asked).removesuffix(self._end_of_turn())

        return in_a_spelling([*messages, answer], attempt)

    def _end_of_turn(self) -> str:
        """What the template puts behind an assistant's text; the end-of-sequence token comes in its place."""
        if self._tail is None:
            self._tail = behind_an_answer(self.tokenizer)
        return self._tail

    def _rendered(self, messages: list[Message], given: Mapping[str, Any], ask: bool) -> str:
        try:
            return rendered(self.tokenizer, messages, given, ask)
        except RefusedError as error:
            raise RefusedError(
                f"the model's chat template refuses a conversation ({error}): {shown(messages, 300)}"
            ) from None

    # --- what the template leaves out ---------------------------------------------------------------------------------

    def _check_tools(self, messages: list[Message], given: Mapping[str, Any], text: str) -> None:
        if given.get("tools"):
            try:
                without = self._rendered(messages, {**given, "tools": None}, ask=True)
            except ValueError:  # it cannot do without them
                return
            if without == text:
                raise ValueError(f"{LEAVES_OUT} 'tools': leave that column out, or {ANOTHER}")

    def _seen(
        self, messages: list[Message], places: Sequence[int], given: Mapping[str, Any], text: str, ask: bool
    ) -> set[tuple[int, str]]:
        """Which calls and thoughts the template shows for certain, by place and key: all are marked, and rendered once.

        Of others, `_check` finds it out one by one, which takes as many renderings.
        """
        marked, marks = list(messages), {}
        for place in places:
            for key in messages[place].keys() & set(CALLS if ask else SPOKEN):
                mark = f"seen{place}{key}seen".replace("_", "")
                marked[place] = {**marked[place], key: _marked(messages[place][key], mark)}
                marks[place, key] = mark
        if not marks:
            return set()
        try:
            rendered = self._rendered(marked, given, ask)
        except ValueError:
            return set()
        return {at for at, mark in marks.items() if mark in rendered and mark not in text}

    def _check(
        self,
        messages: list[Message],
        place: int,
        given: Mapping[str, Any],
        text: str,
        seen: set[tuple[int, str]],
        ask: bool,
    ) -> None:
        """ValueError unless `text` shows what the message says.

        What was thought before a question (`ask`), templates leave out on purpose.
        """
        message = messages[place]

        def matters(other: Message) -> bool:
            """Whether another message in its place gives another text, or none."""
            try:
                return self._rendered([*messages[:place], other, *messages[place + 1 :]], given, ask) != text
            except ValueError:
                return True

        content = message["content"]
        if content and content.strip() not in text and not matters({**message, "content": f"{content}."}):
            raise ValueError(f"{LEAVES_OUT} {_named(place, message)}: leave it out, or {ANOTHER}")
        for key, without in _without_each(message):
            if key in (CALLS if ask else SPOKEN):
                if (place, key) not in seen and not matters(without):
                    raise ValueError(f"{LEAVES_OUT} {key!r} of {_named(place, message)}: leave it out, or {ANOTHER}")
            elif key not in (*SPOKEN, *self._looked_at):
                self._looked_at.add(key)
                self.unseen |= {} if matters(without) else {key: None}


def _named(place: int, message: Message) -> str:
    return f"message {place + 1} (role {message['role']!r})"


def _without_each(message: Message) -> Iterator[tuple[str, Message]]:
    """Each key that is more than a name, and the message without it."""
    for key in message.keys() - set(NAMES):
        yield key, {other: value for other, value in message.items() if other != key}


def _marked(value: Any, mark: str) -> Any:
    """A thought, or a call or a list of them, with a mark in it: behind the text, or the function's name."""
    match value:
        case str():
            return value + mark
        case list():
            return [_marked(call, mark) for call in value if isinstance(call, dict)]
        case {"function": dict() as function}:
            return {**value, "function": _marked(function, mark)}
        case {"name": str() as name}:
            return {**value, "name": name + mark}
    return value


def in_a_spelling(messages: Sequence[Message], attempt: Callable[[Spelling], str]) -> str:
    """The attempt in the first spelling that succeeds; else ValueError, rather of what it leaves out than refuses."""
    calls = any(key in message for message in messages for key in CALLS)
    errors: list[ValueError] = []
    for spelling in (_as_transformers, _as_openai) if calls else (_as_transformers,):
        try:
            return attempt(spelling)
        except ValueError as error:
            errors.append(error)
    raise min(errors, key=lambda error: isinstance(error, RefusedError))


def _as_transformers(message: Message) -> Message:
    return _with_arguments(message, _parsed)


def _as_openai(message: Message) -> Message:
    return _with_arguments(message, _as_text)


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    """The message with other arguments of its calls, which may be under `function` or beside its name."""

    def changed(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call

    calls = message.get("tool_calls")
    spelt = {**message, "tool_calls": [changed(call) for call in calls]} if isinstance(calls, list) else dict(message)
    return {**spelt, "function_call": changed(spelt["function_call"])} if "function_call" in spelt else spelt


def _parsed(arguments: Any) -> Any:
    """The object in a JSON text; else the arguments as they are."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
