"""What an answer's text is made of, and how its calls are found between marks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

THINK = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Call:
    """A call as it was written; `arguments` are checked by whoever reads it."""

    name: Any
    arguments: Any
    id: Any = None


@dataclass(slots=True)
class Pieces:
    """An answer; what was no call of its form is left in `content`, and said in `errors`."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


Reads = Callable[[str], Pieces]
ReadsCall = Callable[[re.Match[str]], Iterable[Call]]  # ValueError says what is wrong


def between(pattern: str, read: ReadsCall, think: tuple[str, str] = THINK) -> Reads:
    """Calls are what matches the pattern, after the reasoning between two marks, if there is any."""
    compiled = re.compile(pattern, re.DOTALL)

    def pieces(text: str) -> Pieces:
        found, left, at = Pieces(), "", 0
        found.reasoning, rest = thought(text, think)
        for match in compiled.finditer(rest):
            try:
                found.calls += read(match)
            except ValueError as error:
                found.errors.append(str(error))
                continue
            left, at = left + rest[at : match.start()], match.end()
        left += rest[at:]
        found.content = left if left == text else left.strip()
        return found

    return pieces


def thought(text: str, think: tuple[str, str]) -> tuple[str, str]:
    """The reasoning, and what comes behind it; its first mark may have been in the prompt."""
    opens, closes = think
    begun = text.lstrip()
    if closes in text.replace(opens, "") or begun.startswith(opens):
        before, _, behind = begun.removeprefix(opens).partition(closes)
        return before.strip(), behind.lstrip()
    return "", text


def ended(match: re.Match[str], mark: str) -> str:
    """The body of a call; ValueError if the mark is not behind it."""
    if not match["end"]:
        raise ValueError(f"it does not end with {mark}")
    return match["body"]


def from_json(text: str) -> Any:
    """The value; ValueError if it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} at character {error.pos + 1}") from None


def call_of(value: Any) -> Call:
    """Of `{"name": ..., "arguments": {...}}`, or `parameters`, or with these in `function`."""
    inner = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(inner, dict) or "name" not in inner:
        raise ValueError('it is no object with "name" and "arguments"')
    if "arguments" not in inner and "parameters" not in inner:
        raise ValueError('it has no "arguments"')
    return Call(inner["name"], inner.get("arguments", inner.get("parameters")), value.get("id"))


def calls_of(value: Any) -> list[Call]:
    """Of a list of calls, or of one."""
    return [call_of(each) for each in (value if isinstance(value, list) else [value])]
