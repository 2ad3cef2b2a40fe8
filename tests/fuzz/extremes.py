"""Small one-shot updates that ask for a lot: of memory, of steps, or of an error's words."""

from __future__ import annotations

import base64
import copy
import pickle
import random
import struct
from collections.abc import Callable
from typing import Any

Info = dict[str, Any]  # a message's update_info

STAND_IN = "LAUGHS"  # for a value that pickle.dumps would not write
LONG = -1.2345678901234567e-300  # the longest that one value is when it is printed
FIELD = 6  # of a host memory handle, which a refusal prints: its dtype


def laughs(width: int, levels: int) -> bytes:
    """Instructions for a tuple that holds a tuple `width` times, which holds one as often, and so on: width**levels."""
    memo = lambda level: b"r" + (1000 + level).to_bytes(4, "little")  # noqa: E731
    again = lambda level: b"j" + (1000 + level).to_bytes(4, "little")  # noqa: E731
    told = b"(" * levels + b"G" + struct.pack(">d", LONG) + memo(0)
    return told + b"".join(again(level) * (width - 1) + b"t" + memo(level + 1) for level in range(levels))


def encoded(times: int, length: int = 4096) -> bytes:
    """A list of `times` protocol-2 bytes, each made of the same text by a call of its own."""
    text = b"X" + length.to_bytes(4, "little") + b"a" * length + b"r\0\1\0\0"
    call = b"c_codecs\nencode\nr\1\1\0\0" + text + b"X\6\0\0\0latin1\x86r\2\1\0\0R"
    return b"(" + call + b"j\1\1\0\0j\2\1\0\0R" * (times - 1) + b"t"


def _in_a_field(instructions: bytes, info: Info, handles: list[Any]) -> Info:
    """The update, with a value in one handle that these instructions make."""
    [fields] = handles[0].values()
    fields[FIELD] = STAND_IN
    data = pickle.dumps([{uuid: tuple(values) for uuid, values in handle.items()} for handle in handles], 2)
    spelled = b"X" + len(STAND_IN).to_bytes(4, "little") + STAND_IN.encode()
    assert data.count(spelled) == 1
    data = data.replace(spelled, instructions)
    info = {key: value for key, value in info.items() if key != "ipc_handles"}
    return info | {"ipc_handles_pickled": base64.b64encode(data).decode()}


def _many_values(rng: random.Random, info: Info, handles: list[Any]) -> Info:
    return _in_a_field(laughs(*rng.choice([(45, 4), (160, 3), (20, 4), (30, 2)])), info, handles)


def _many_bytes(rng: random.Random, info: Info, handles: list[Any]) -> Info:
    return _in_a_field(encoded(rng.choice([10, 60_000, 60_000])), info, handles)


def _large_shape(rng: random.Random, info: Info, handles: list[Any]) -> Info:
    shape = rng.choice([[2**47, 2**47, 0], [0, 2**47, 2**47], [2**47] * 60 + [0], [2**47] * 64])
    [fields] = handles[0].values()
    fields[5], fields[7] = rng.choice([0, 0, 0, 4]), shape
    info = {key: value for key, value in info.items() if key != "ipc_handles_pickled"}
    return info | {"ipc_handles": handles, "shapes": [shape, *info["shapes"][1:]]}


EXTREMES: list[Callable[[random.Random, Info, list[Any]], Info]] = [_many_values, _many_bytes, _large_shape]


def extreme(rng: random.Random, info: Info, handles: list[Any]) -> Info:
    """The update_info of as many `handles`, one of which asks for a lot."""
    handles = copy.deepcopy(handles[: len(info["names"])])
    return rng.choice(EXTREMES)(rng, info, handles)
