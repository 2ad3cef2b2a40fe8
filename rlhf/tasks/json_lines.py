"""A file of JSON objects, one a line or in one array: strict reading, and what is said of what is bad in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rlhf.tasks.formats import BOM, OF_HF, kind_of_file, opened
from transfer.agreement.shown import shown

SHOWN = 10  # bad lines in one error message
SPACE = re.compile(r"[ \t\r\n]*")
Record = tuple[str, dict[str, Any] | ValueError]  # where it is, and its columns, or what is wrong with it


def json_records(path: str, key: str = "task.path") -> Iterator[Record]:
    """Each object of the file; ValueError if it cannot be read, or is a file of another kind."""
    with opened(path, key) as file:
        head = file.head()
        if (kind := kind_of_file(path, head)) in OF_HF:
            raise ValueError(f"{path}: that is {kind}: use task=hf, which reads it as it is")
        first = head.lstrip()
        if first.split(b"\n", 1)[0].strip() == b"{":
            raise ValueError(
                f"{path}: that is a JSON object over several lines: {key} takes an object a line (jq -c . FILE), "
                "or one array of them"
            )
        if not first.startswith(b"["):
            yield from _of_lines(path, file)
            return
        raw = file.read().removeprefix(BOM)
        yield from _of_lines(path, raw.splitlines()) if _has_lines(raw) else _of_array(path, raw)


def _of_lines(path: str, file: Iterable[bytes]) -> Iterator[Record]:
    number = 0
    for part in file:
        for line in (part if number else part.removeprefix(BOM)).splitlines():
            number += 1
            if line.strip():
                yield f"{path}:{number}", _or_error(line)


def _or_error(line: bytes) -> dict[str, Any] | ValueError:
    try:
        return columns_of(line)
    except ValueError as error:
        return error


def _has_lines(raw: bytes) -> bool:
    """Whether a file that begins with an array has one a line, rather than being one."""
    first, *others = raw.strip().split(b"\n", 1)
    try:
        json.loads(first)
    except RecursionError:
        return True
    except ValueError:
        return False
    return bool(others)


def _of_array(path: str, raw: bytes) -> Iterator[Record]:
    """Each object by the line in which it begins; nothing behind the first that is no JSON."""
    try:
        for line, item in _items(raw.decode()):
            yield f"{path}:{line}", item if isinstance(item, ValueError) else object_in(item)
    except UnicodeError as error:
        line = raw[: error.start].count(b"\n") + 1  # type: ignore[attr-defined]
        yield f"{path}:{line}", ValueError(f"not UTF-8: {error.reason}")  # type: ignore[attr-defined]


def _items(text: str) -> Iterator[tuple[int, Any]]:
    """The line and the value of each item of the array that the text is; a ValueError is the last one."""
    at = _past(text, _past(text, 0) + 1)
    line, counted, ended = 1, 0, text.startswith("]", at)
    at = _past(text, at + 1) if ended else at
    while not ended:
        line, counted = line + text.count("\n", counted, at), at
        try:
            item, at = DECODER.raw_decode(text, at)
        except (RecursionError, ValueError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"
            yield line, ValueError(reason)
            return
        yield line, item
        at = _past(text, at)
        if text[at : at + 1] not in (",", "]"):
            yield line, ValueError(f"not JSON: behind it must be ',' or ']' (got {shown(text[at : at + 20])})")
            return
        ended, at = text[at] == "]", _past(text, at + 1)
    if text[at:]:
        yield line, ValueError(f"not JSON: more is behind the array ({shown(text[at : at + 20])})")


def _past(text: str, at: int) -> int:
    """Where the text goes on behind white space."""
    found = SPACE.match(text, at)
    return found.end() if found else at


def columns_of(line: bytes) -> dict[str, Any]:
    """The object in a line; ValueError says what is wrong with it."""
    try:
        found = json.loads(line.decode(), parse_constant=_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from None  # type: ignore[attr-defined]
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if isinstance(columns := object_in(found), ValueError):
        raise columns
    return columns


def object_in(found: Any) -> dict[str, Any] | ValueError:
    """The columns of a row, or what is wrong with them."""
    try:
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair can be neither tokenised nor written
    except RecursionError:
        return ValueError("nested too deeply")
    except UnicodeError as error:
        return ValueError(f"not UTF-8: {error.reason}")  # type: ignore[attr-defined]
    return found if isinstance(found, dict) else ValueError(f"must be a JSON object, not {kind_of(found)}")


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number (RFC 8259): write null, or leave the column out")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice: keep one of them")
    return found


DECODER = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=_object)


def report(bad: Sequence[tuple[str, str]], good: int, these: str = "all") -> str:
    """All (place, reason) in one text: at most SHOWN of them, or one, if every one of `these` has the same fault."""
    (place, reason), *others = bad
    if others and not good and {other for _, other in others} == {reason}:
        return f"{place}: {reason} (and so in {these} {len(bad)} lines)"
    return "\n".join([*(f"{place}: {reason}" for place, reason in bad[:SHOWN]), *_more(len(bad))])


def _more(count: int) -> Iterator[str]:
    if count > SHOWN:
        yield f"and {count - SHOWN} more bad lines"


def some(places: Sequence[str], shown: int = 3) -> str:
    """The first places, and how many there are beside them."""
    more = f", and {len(places) - shown} more" if len(places) > shown else ""
    return ", ".join(places[:shown]) + more


def counted(places: Sequence[str]) -> str:
    """How many there are, and the first of them."""
    return f"{len(places)} ({some(places)})"


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
