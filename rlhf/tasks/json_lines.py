"""A file of JSON objects, one a line: strict reading, and what is said of bad lines and of files of other kinds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transfer.agreement.shown import shown

SHOWN = 10  # bad lines in one error message
MAGIC = {  # first bytes of files that are no text
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
TABLES = {".csv": "a CSV file", ".tsv": "a TSV file"}


@contextmanager
def _told(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"task.path: cannot read {path} from {Path.cwd()}: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise ValueError(f"task.path: cannot read {path!r}: {error}") from None


def lines(path: str) -> list[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1; ValueError if the file cannot be read or is no JSON."""
    with _told(path):
        raw = Path(path).expanduser().read_bytes()
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if kind := _other_kind(path, raw):
        raise ValueError(
            f"{path} is {kind}, and task.path takes JSON lines, one object a line, in UTF-8: write it anew, "
            "for instance with datasets.load_dataset(...)[...].to_json(path)"
        )
    return [(number, line) for number, line in enumerate(raw.splitlines(), start=1) if line.strip()]


def _other_kind(path: str, raw: bytes) -> str:
    """What the file is, if it is no JSON lines; else nothing."""
    for magic, kind in MAGIC.items():
        if raw.startswith(magic):
            return kind
    if raw[:1] not in (b"{", b"") and (kind := TABLES.get(Path(path).suffix.lower(), "")):
        return kind
    if raw.lstrip()[:2].strip() in (b"[", b"[{", b"[["):
        try:
            rows = json.loads(raw)
        except (ValueError, RecursionError):  # not one of the usual kinds: its lines say more
            return ""
        return "one JSON array" if rows and all(isinstance(row, dict) for row in rows) else ""
    return ""


def columns_of(line: bytes) -> dict[str, Any]:
    """The object in a line; ValueError says what is wrong with it."""
    try:
        columns = json.loads(line.decode(), parse_constant=_constant, object_pairs_hook=_object)
        json.dumps(columns, ensure_ascii=False).encode()  # half a surrogate pair can be neither tokenised nor written
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from None  # type: ignore[attr-defined]
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(columns, dict):
        raise ValueError(f"must be a JSON object, not {kind_of(columns)}")
    return columns


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number (RFC 8259): write null, or leave the column out")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice: keep one of them")
    return found


def report(bad: Sequence[tuple[str, str]], good: int) -> str:
    """All (place, reason) in one text: at most SHOWN of them, or one, if every line has the same fault."""
    (place, reason), *others = bad
    if others and not good and {other for _, other in others} == {reason}:
        return f"{place}: {reason} (and so in all {len(bad)} lines)"
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
