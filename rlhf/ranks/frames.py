"""What ranks tell each other as bytes: JSON, with columns of numbers (`array.array`) beside it, as they lie in memory.

bytes                 what
8    uint64           bytes of the JSON
...                   the JSON; a column is {"\\u0000": [type code, length]}
...                   the columns, in the order in which the JSON has them
"""

from __future__ import annotations

import json
import struct
from array import array
from typing import Any

from rlhf.types import Completion, Told

HEAD = struct.Struct("<Q")
COLUMN = "\0"


def packed(value: Any) -> bytes:
    """JSON and columns as bytes; TypeError for what is neither."""
    columns: list[array[Any]] = []

    def default(held: Any) -> Any:
        if not isinstance(held, array):
            raise TypeError(f"{type(held).__name__} is neither JSON nor a column")
        columns.append(held)
        return {COLUMN: [held.typecode, len(held)]}

    head = json.dumps(value, default=default, separators=(",", ":")).encode()
    return b"".join([HEAD.pack(len(head)), head, *(held.tobytes() for held in columns)])


def unpacked(raw: bytes) -> Any:
    """The inverse of `packed`."""
    (size,) = HEAD.unpack_from(raw)
    at = HEAD.size + size

    def column(pairs: dict[str, Any]) -> Any:
        nonlocal at
        if COLUMN not in pairs:
            return pairs
        code, length = pairs[COLUMN]
        held = array(code)
        end = at + length * held.itemsize
        held.frombytes(raw[at:end])
        at = end
        return held

    return json.loads(raw[HEAD.size : HEAD.size + size], object_hook=column)


def told_row(row: Completion) -> list[Any]:
    """A row of samples as JSON and columns."""
    prompt = None if row.prompt is None else list(row.prompt)
    earlier = [told_row(each) for each in row.earlier]
    return [row.ids, row.logprobs, row.versions, row.finish_reason, row.sampled, prompt, earlier]


def heard_row(said: Any) -> Completion:
    """The inverse of `told_row`."""
    ids, logprobs, versions, reason, sampled, prompt, earlier = said
    row = ids, logprobs, versions, reason, sampled
    return Completion(*row, None if prompt is None else tuple(prompt), tuple(map(heard_row, earlier)))


def told_episode(told: Told) -> list[Any]:
    """What a conversation was; `Told(*...)` is the inverse."""
    return [told.said, told.score, told.failed, told.counts, told.why, told.messages]
