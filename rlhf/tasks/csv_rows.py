"""Rows of a CSV or TSV file, each value the text that stands there.

No number loses its zeros, no text is taken for null. A field that is empty is absent.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator

from rlhf.tasks.formats import TSV, opened
from rlhf.tasks.json_lines import Record


def csv_records(path: str, key: str, kind: str) -> Iterator[Record]:
    """Each row, by the line in which it ends; ValueError where the file has no header, or is not UTF-8."""
    csv.field_size_limit(sys.maxsize)  # a conversation is longer than csv expects of a field
    with opened(path, key) as file:
        rows = csv.reader(
            io.TextIOWrapper(file, encoding="utf-8-sig", newline=""),
            "excel-tab" if kind == TSV else "excel",
            strict=True,
        )
        try:
            header = next(rows, [])
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise ValueError(f"{path}: the column {twice[0]!r} is there twice: keep one of them")
            for row in rows:
                if row:
                    yield f"{path}:{rows.line_num}", _columns(header, row)
        except UnicodeError as error:
            raise ValueError(f"{path}:{rows.line_num + 1}: not UTF-8: {error.reason}") from None  # type: ignore[attr-defined]
        except csv.Error as error:
            raise ValueError(f"{path}:{rows.line_num}: not {kind}: {error}") from None


def _columns(header: list[str], row: list[str]) -> dict[str, str | None] | ValueError:
    if len(row) != len(header):
        return ValueError(f"has {len(row)} fields, and the header {len(header)}: quote fields that have a separator")
    return {name: value or None for name, value in zip(header, row, strict=True)}
