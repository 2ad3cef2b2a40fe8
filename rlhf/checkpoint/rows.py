"""What the rows of a run's task are, in a few bytes each: a run that goes on tells by them whether it still has these.

A row is what stages are given of it: token ids, texts, and the columns that rewards use. Order counts, as batches are
drawn by number.
"""

from __future__ import annotations

import base64
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.models.encoding import encode
from rlhf.shell.ending import RunError
from rlhf.types import IDS, Prompt, Task, Tokenizer

MARK = 4  # bytes that are kept of a row's hash: enough to find the first that differs
AT_ONCE = 1024  # texts that are tokenised together
SHOWN = 60  # characters of a row in a message
ROWS, MOMENT = "rows", "moment"  # of a checkpoint's notes


@dataclass(frozen=True, slots=True)
class Split:
    """The rows of one kind, in their order."""

    rows: int
    sha256: str
    marks: str  # base64 of MARK bytes a row

    @classmethod
    def of(cls, rows: Iterable[bytes]) -> Split:
        """Rows that are given as bytes."""
        whole, marks = hashlib.sha256(), bytearray()
        for row in rows:
            digest = hashlib.sha256(row).digest()
            whole.update(digest)
            marks += digest[:MARK]
        return cls(len(marks) // MARK, whole.hexdigest(), base64.b64encode(marks).decode())

    def first_other(self, other: Split) -> int:
        """The number, from 0, of the first row that is not the other's; the length of the shorter if all are."""
        mine, theirs = base64.b64decode(self.marks), base64.b64decode(other.marks)
        places = range(0, min(len(mine), len(theirs)), MARK)
        there = (place for place in places if mine[place : place + MARK] != theirs[place : place + MARK])
        return next(there, len(places) * MARK) // MARK


def splits_of(task: Task, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """What all rows of a task are, as JSON, by the names of its splits."""
    shown = _encoded(tokenizer, [answer for _, answer in task.demonstrations])
    chosen = _encoded(tokenizer, [pair.chosen for pair in task.preferences])
    rejected = _encoded(tokenizer, [pair.rejected for pair in task.preferences])
    asked_of_pairs = [pair.prompt.ids for pair in task.preferences]
    rows: dict[str, Iterable[bytes]] = {
        "train": map(_asked, task.train),
        "held_out": map(_asked, task.held_out),
        "demonstrations": map(_joined, [prompt.ids for prompt, _ in task.demonstrations], shown),
        "preferences": map(_joined, asked_of_pairs, chosen, rejected),
    }
    return {name: asdict(Split.of(each)) for name, each in rows.items()}


def check_rows(before: Mapping[str, Any] | None, now: Mapping[str, Any], task: Task, allowed: bool) -> str:
    """What there is to say of a run that goes on with the rows `now`; RunError where others are not `allowed`."""
    if before is None:
        old = "the checkpoint, an older one, does not say which rows it was trained on"
        return f"{old}: the task's are taken as they are"
    differs = ", ".join(_differences(before, now, task))
    if not differs:
        return ""
    if allowed:
        return f"warning: other rows from here on: {differs}"
    raise RunError(
        f"the task's rows are not those that the run began with: {differs}; go on with the data, the tokenizer and the "
        "chat template that it had, or set checkpoint.check_data=false, if held-out rows may have been trained on"
    )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], task: Task) -> Iterator[str]:
    prompts: dict[str, Sequence[Prompt]] = {"train": task.train, "held_out": task.held_out}
    prompts["demonstrations"] = [prompt for prompt, _ in task.demonstrations]
    prompts["preferences"] = [pair.prompt for pair in task.preferences]
    for name, told in now.items():
        was, split = _read(before, name), Split(**told)
        if was.sha256 == split.sha256:
            continue
        first = split.first_other(was)
        counts = f"{split.rows} rows" + (f" (were {was.rows})" if was.rows != split.rows else "")
        here = _named(prompts[name][first]) if first < split.rows else "no more"
        yield f"{name} has {counts}, and the first that differs is row {first + 1} ({here})"


def _read(before: Mapping[str, Any], name: str) -> Split:
    try:
        return Split(**before[name])
    except (KeyError, TypeError) as error:
        raise ValueError(f"what the checkpoint says of the task's rows cannot be read: {name}: {error}") from error


def _named(prompt: Prompt) -> str:
    """Where a row is in its file, which numbers after a shuffle do not tell, and how it begins."""
    return f"{prompt.where}{': ' if prompt.where else ''}{prompt.text!r:.{SHOWN}}"


def _asked(prompt: Prompt) -> bytes:
    """All that a prompt is, with what only rewards see."""
    known = json.dumps([prompt.text, prompt.columns, list(prompt.messages)], sort_keys=True, default=str)
    return _joined(prompt.ids) + known.encode()


def _joined(*rows: Sequence[int]) -> bytes:
    """Token ids, each row behind its length."""
    return b"".join(array(IDS, [len(row), *row]).tobytes() for row in rows)


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """Token ids of each text, with EOS; of some at a time, as the tokenizer keeps more of each than its ids."""
    for start in range(0, len(texts), AT_ONCE):
        yield from encode(tokenizer, texts[start : start + AT_ONCE], end=True)
