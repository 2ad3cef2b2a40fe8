"""Whatever comes from outside as a few characters of one safe line, for errors, logs and the terminal.

`shown` prints a value without reading more of it than it shows, be it lists inside each other of which each holds the
next a hundred times. `printable`, `one_line` and `told` leave no character in a text that a terminal would obey.
Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

MAX_SHOWN = 80  # characters of a value
MAX_LINE = 2000  # characters of a text
MAX_TOLD = 300  # of what an exception says
MAX_BITS = 256  # of an integer that is written out
MAX_LEVELS = 16  # containers inside each other
CUT = "..."
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # what logs are coloured with: dropped, where all else is shown escaped
UNUSUAL = re.compile(r"[^\x20-\x7e\t\n]")


def shown(value: Any, limit: int = MAX_SHOWN) -> str:
    """At most `limit` characters of what repr would write, after work that does not grow with the value."""
    text = ""
    for piece in _pieces(value, limit, MAX_LEVELS):
        text += piece
        if len(text) > limit:
            return text[: limit - len(CUT)] + CUT
    return text


def printable(text: str) -> str:
    """The text, which may have several lines, without colours and with every other control character escaped."""
    return UNUSUAL.sub(_escaped, COLOUR.sub("", text))


def one_line(text: str, limit: int = MAX_LINE) -> str:
    """At most `limit` characters of a text, `printable` and with its lines joined, whatever the text's length."""
    line = printable(" ".join(text[: 8 * limit].split()))
    return line if len(line) <= limit else line[: limit - len(CUT)] + CUT


def told(error: BaseException, limit: int = MAX_TOLD) -> str:
    """An exception of anybody's code in one line, its kind first; also of one that cannot say what it is."""
    try:
        text = str(error)
    except Exception:  # its own __str__ is broken
        text = "without words"
    return f"{type(error).__name__}: {one_line(text, limit)}"


def _escaped(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]  # printable ones as they are


def _pieces(value: Any, limit: int, levels: int) -> Iterator[str]:
    """What repr would write, in pieces of which each has a character and about `limit` of them at most."""
    if isinstance(value, Mapping | list | tuple) and not levels:
        yield CUT
        return
    inner = levels - 1
    match value:
        case str() | bytes() | bytearray():
            yield repr(value[:limit])
        case int() if value.bit_length() > MAX_BITS:
            yield f"<an integer of {value.bit_length()} bits>"
        case Mapping():
            pairs = (chain(_pieces(k, limit, inner), [": "], _pieces(v, limit, inner)) for k, v in value.items())
            yield from _joined("{", pairs, "}")
        case list():
            yield from _joined("[", (_pieces(each, limit, inner) for each in value), "]")
        case tuple():
            yield from _joined("(", (_pieces(each, limit, inner) for each in value), ",)" if len(value) == 1 else ")")
        case _:
            yield repr(value)[: limit + 1]


def _joined(begin: str, items: Iterable[Iterable[str]], end: str) -> Iterator[str]:
    yield begin
    for index, item in enumerate(items):
        if index:
            yield ", "
        yield from item
    yield end
