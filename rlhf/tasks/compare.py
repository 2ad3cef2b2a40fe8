"""Whether an answer is the row's, as a text: all of it, or what follows the last mark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rlhf.config import FileTaskConfig
from rlhf.tasks.raw import Gold, Row

NUMBER = re.compile(r"([-+]?)\$?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?\.?")


def verifier(config: FileTaskConfig, rows: Sequence[Row], key: str) -> Gold:
    """What compares an answer with its row's; ValueError where no reference has the mark of `task.answer_after`.

    `key` names the data in messages.
    """
    column, mark = config.answer_column, config.answer_after
    references = [row.columns[column] for row in rows if isinstance(row.columns.get(column), str)]
    if mark is not None and references and not any(mark in reference for reference in references):
        raise ValueError(f"task.answer_after={mark!r} is in no {column!r} of {key}: change it, or leave it out")
    return partial(same_answer, column, mark)


def same_answer(answer_column: str, mark: str | None, columns: Mapping[str, Any], answer: str) -> float | None:
    """1.0 if `answer` is the row's, outer white space aside, else 0.0; None if the row has none.

    With a mark what follows the last one is compared, numbers without $ and without commas between thousands: an answer
    without the mark is wrong, and a reference without it is compared as a whole.
    """
    right = columns.get(answer_column)
    if not isinstance(right, str):
        return None
    if mark is None:
        return float(answer.strip() == right.strip())
    return float(mark in answer and _after(mark, answer) == _after(mark, right))


def _after(mark: str, text: str) -> str:
    last = text.rpartition(mark)[2].strip()
    number = NUMBER.fullmatch(last)
    return "".join(part or "" for part in number.groups()).replace(",", "") if number else last
