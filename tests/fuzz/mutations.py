"""Valid control messages, bent: JSON of the wrong types, values, keys and depth, broken bytes, and hostile pickles.

Everything is drawn from one random.Random, so that a seed and the messages before it bring back any message.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import pickle
import pickletools
import random
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

MARK = os.environ.setdefault("FUZZ_MARK", f"/tmp/pwned-by-the-fuzz-{os.getpid()}")  # what hostile pickles would leave

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 5, -1, 0.5, 1.0, -0.0, 1e-320, 1e308),
    *(2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400, -(2**63)),
    *("", "0", "1", "-1", "1.0", " 1", "\u0663", "1" * 18, "1" * 19, "a" * 4096, "a" * 4097, "NaN", "true"),
    *("\0", "\ud800", "\udfff\ud800", "\U0001f600", "\u202e", "\r\nX-Evil: 1", "%00", "a\nb", "{}", "[]"),
    *("../../../etc/passwd", "/dev/shm/x", "/proc/self/mem", "file:///etc/passwd", "http://169.254.169.254/"),
    *("__class__", "__reduce__", "__builtins__", "os.system", "memfd", "float32", "torch.float32", "latin1"),
    *("0" * 128, "f" * 128, "xxh3:" + "0" * 32, "sums:" + "0" * 32, "sums:", "xxh3:"),
    *([], {}, [[]], [{}], {"": ""}, {"__proto__": 1}, [0] * 100, [None], ["a"], [[0]], [1, "a"], {"slot": 0}),
]
RAW = [  # not what json.dumps would write
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" + "0" * 4299, "1" + "0" * 5000, "-0", "1e5", "1E-2"),
    *("0x10", "01", "1.", "+1", "'a'", "undefined", "nul", '"\\ud800"', '"\\x"', '"\\u12"', '"\t"', '"', "[1,]"),
    *("[" * 40 + "]" * 40, "[" * 950 + "]" * 950, "[" * 100_000, '{"a":1,}'),
    *('{"a":' * 30 + "1" + "}" * 30, '{"a":' * 900 + "1" + "}" * 900),
]
KEYS = ["epoch", "version", "where", "digest", "path", "url", "class", "__class__", "", "\ud800", "a" * 10_000, "slot"]


class Mutator:
    """Draws and bends messages."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._may_grow = True  # once a message: the second time would multiply the first

    def body(self, message: dict[str, Any]) -> bytes:
        """The message's JSON with a few changes, or a few more bytes wrong."""
        message = copy.deepcopy(message)
        self._may_grow = True
        raws: list[str] = []
        for _ in range(self._few()):
            self.random.choice(CHANGES)(self, message, raws)
        text = json.dumps(message)
        for index, raw in enumerate(raws):
            text = text.replace(f'"@{index}@"', raw, 3)
        data = text.encode()
        return self._damaged(data) if self.random.random() < 0.15 else data

    def query(self, known: list[str]) -> bytes:
        """A query string, mostly of known parameters."""
        keys = [self.random.choice(known or ["mode"]) for _ in range(self._few())]
        values = ["abort", "keep", "1", "2", "true", "FALSE", "", "\0", "é", "\ud800", "a" * 5000, "weights"]
        pairs = [(key, self.random.choice(values)) for key in keys]
        honest = self.random.random() < 0.7
        text = urlencode(pairs, errors="surrogatepass") if honest else quote(str(pairs), safe="&=[]")
        return self._damaged(text.encode("latin-1", "replace")) if self.random.random() < 0.1 else text.encode()

    def handles(self, handles: list[Any]) -> str:
        """base64 of a pickle of tensors' handles, of which something is wrong."""
        if self.random.random() < 0.5:
            handles = self._bent(handles)
        try:
            data = pickle.dumps(handles, self.random.randrange(6))
        except (ValueError, RecursionError):
            data = pickle.dumps(None)
        for _ in range(self.random.choice([0, 1, 1, 2, 3])):
            data = self.random.choice(PICKLE_CHANGES)(self, data)
        text = base64.b64encode(data).decode()
        if self.random.random() < 0.1:
            text = self._damaged(text.encode()).decode("utf-8", "replace")
        return text

    def bent(self, value: Any) -> Any:
        """A deep copy with one inner value replaced."""
        return self._bent(value)

    # --- structure

    def value(self) -> Any:
        return copy.deepcopy(self.random.choice(VALUES))

    def place(self, value: Any) -> tuple[Any, Any]:
        """A random inner place as (container, key); an empty message has one that is not in it."""
        container, key = {"a": None}, "a"
        while isinstance(value, dict | list) and value:
            container, key = value, self.random.choice(list(value) if isinstance(value, dict) else range(len(value)))
            value = container[key]
            if self.random.random() < 0.2:
                break
        return container, key

    def _few(self) -> int:
        return self.random.choice([1, 1, 1, 2, 2, 3, 6])

    def many(self, values: list[Any]) -> list[Any]:
        """A list with a lot more of the same."""
        times, self._may_grow = (300 if self._may_grow else 2), False
        return values * times

    def _bent(self, value: Any) -> Any:
        self._may_grow = True
        holder = [_as_lists(value)]
        container, key = self.place(holder)
        others = [self.value(), _nudged(self, container[key]), self.random.randbytes(66), b"/torch_1_2_3"]
        container[key] = self.random.choice(others)
        return _as_tuples(holder[0], self.random.random() < 0.9)

    # --- bytes

    def _damaged(self, data: bytes) -> bytes:
        for _ in range(self._few()):
            data = self.random.choice(BYTE_CHANGES)(self, data)
        return data

    def span(self, data: bytes) -> tuple[int, int]:
        """The borders of a short stretch of `data`."""
        start = self.random.randrange(len(data) + 1)
        return start, min(len(data), start + self.random.choice([0, 1, 1, 2, 4, 16, 100]))


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_lists(inner) for key, inner in value.items()}
    return [_as_lists(inner) for inner in value] if isinstance(value, list | tuple) else value


def _as_tuples(value: Any, inside: bool) -> Any:
    """The lists inside dicts as tuples, as handles have them."""
    if isinstance(value, dict):
        return {k: tuple(v) if inside and isinstance(v, list) else _as_tuples(v, inside) for k, v in value.items()}
    return [_as_tuples(inner, inside) for inner in value] if isinstance(value, list) else value


def _nudged(mutator: Mutator, value: Any) -> Any:
    """Something near the value, or of a neighbouring type."""
    pick = mutator.random.choice
    match value:
        case bool():
            return pick([not value, int(value), str(value)])
        case int():
            return pick([value + 1, value - 1, value + 256, value * 2, -value, str(value), value % 2**53 / 1, [value]])
        case float():
            return pick([value * 2, -value, 1 / (value or 1), str(value), int(value) if abs(value) < 1e300 else 0])
        case str():
            return pick([value[1:], value + "x", value * 2, value.upper(), [value], {value: 1}, value[:-1] + "\ud800"])
        case list():
            return pick([value[1:], value * 2, mutator.many(value), value[::-1], {"0": value}, [value], len(value)])
        case dict():
            return pick([[value], list(value), list(value.values()), {**value, "x": 1}, {}, len(value)])
    return pick([0, "", [], {}])


# --- changes of JSON --------------------------------------------------------------------------------------------------


def _replace(m: Mutator, message: Any, raws: list[str]) -> None:
    container, key = m.place(message)
    container[key] = m.value()


def _nudge(m: Mutator, message: Any, raws: list[str]) -> None:
    container, key = m.place(message)
    container[key] = _nudged(m, container[key])


def _write_raw(m: Mutator, message: Any, raws: list[str]) -> None:
    container, key = m.place(message)
    container[key] = f"@{len(raws)}@"
    raws.append(m.random.choice(RAW))


def _delete(m: Mutator, message: Any, raws: list[str]) -> None:
    container, key = m.place(message)
    del container[key]


def _rename(m: Mutator, message: Any, raws: list[str]) -> None:
    container, key = m.place(message)
    if isinstance(container, dict):
        container[m.random.choice(KEYS)] = container.pop(key)


def _add(m: Mutator, message: Any, raws: list[str]) -> None:
    container, _ = m.place(message)
    if isinstance(container, dict):
        container[m.random.choice(KEYS)] = m.value()
    else:
        container.append(m.value())


def _twice(m: Mutator, message: Any, raws: list[str]) -> None:
    """A key that comes twice."""
    container, key = m.place(message)
    if isinstance(container, dict):
        container[f"@{len(raws)}@"] = m.value()
        raws.append(json.dumps(key))


def _swap(m: Mutator, message: Any, raws: list[str]) -> None:
    (one, first), (other, second) = m.place(message), m.place(message)
    one[first], other[second] = copy.deepcopy(other[second]), copy.deepcopy(one[first])


def _nest(m: Mutator, message: Any, raws: list[str]) -> None:
    container, key = m.place(message)
    for _ in range(m.random.choice([1, 2, 8, 31, 33, 200])):
        container[key] = [container[key]] if m.random.random() < 0.5 else {"a": container[key]}


CHANGES: list[Callable[[Mutator, Any, list[str]], None]] = [
    *(_replace, _replace, _nudge, _nudge, _nudge, _write_raw, _delete, _rename, _add, _twice, _swap, _nest),
]


# --- changes of bytes -------------------------------------------------------------------------------------------------


def _flip(m: Mutator, data: bytes) -> bytes:
    if not data:
        return b"\0"
    at = m.random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << m.random.randrange(8))]) + data[at + 1 :]


def _cut(m: Mutator, data: bytes) -> bytes:
    start, end = m.span(data)
    return data[:start] + data[end:]


def _truncate(m: Mutator, data: bytes) -> bytes:
    return data[: m.random.randrange(len(data) + 1)]


def _insert(m: Mutator, data: bytes) -> bytes:
    at, _ = m.span(data)
    new = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"', b"{", b"]", b"\\u", m.random.randbytes(8)]
    return data[:at] + m.random.choice(new) + data[at:]


def _repeat(m: Mutator, data: bytes) -> bytes:
    start, end = m.span(data)
    return data[:end] + data[start:end] * m.random.choice([1, 3, 1000]) + data[end:]


BYTE_CHANGES = [_flip, _flip, _cut, _truncate, _insert, _repeat]


# --- changes of pickles -----------------------------------------------------------------------------------------------

OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


def _call(module: str, name: str, argument: str) -> list[bytes]:
    """Instructions that would call `module.name(argument)`, in the old and the new spelling."""
    packed = [len(text).to_bytes(1, "little") + text.encode() for text in (module, name, argument)]
    return [
        f"c{module}\n{name}\n(S'{argument}'\ntR".encode(),
        f"(S'{argument}'\ni{module}\n{name}\n".encode(),
        f"(c{module}\n{name}\nS'{argument}'\no".encode(),
        b"\x8c" + packed[0] + b"\x8c" + packed[1] + b"\x93\x8c" + packed[2] + b"\x85R",
        b"\x8c" + packed[0] + b"\x8c" + packed[1] + b"\x93\x8c" + packed[2] + b"\x85\x81",
    ]


GADGETS = [
    *_call("os", "system", f"touch {MARK}"),
    *_call("posix", "system", f"touch {MARK}"),
    *_call("builtins", "eval", f"open({MARK!r}, chr(119))".replace("'", '"')),
    *_call("builtins", "exec", "import os"),
    *_call("subprocess", "Popen", "true"),
    *_call("importlib", "import_module", "colorsys"),
    *_call("torch.storage", "_load_from_bytes", "x"),
    *_call("torch", "load", MARK),
    *_call("torch.multiprocessing.reductions", "rebuild_storage_fd", "x"),
    *_call("_codecs", "encode", "a" * 200),
    *_call("torch", "Size", "x"),
    b"\x82\x01", b"\x83\x01\x00", b"Pid\n", b"NQ", b"}b", b"}(N\x8c\x01aub", b"\x96\x02\0\0\0\0\0\0\0aa", b"\x97",
    b"\x8e" + (2**62).to_bytes(8, "little"), b"\x8b" + (2**31 - 1).to_bytes(4, "little"), b"I" + b"9" * 5000 + b"\n",
    b"]" * 2000, b"(" * 2000, b"\x85" * 30, b"2" * 50, b"0" * 5, b"q\xff", b"h\xff", b"\x94" * 200, b"]\x94h\x00a",
]  # fmt: skip


def _before_instruction(m: Mutator, data: bytes, new: bytes) -> bytes:
    try:
        places = [at for _, _, at in pickletools.genops(data) if at is not None]
    except Exception:  # damaged already
        places = list(range(len(data) + 1))
    at = m.random.choice(places)
    return data[:at] + new + data[at:]


def _gadget(m: Mutator, data: bytes) -> bytes:
    return _before_instruction(m, data, m.random.choice(GADGETS))


def _instead(m: Mutator, data: bytes) -> bytes:
    return b"\x80" + bytes([m.random.randrange(7)]) + m.random.choice(GADGETS) + b"."


def _instruction(m: Mutator, data: bytes) -> bytes:
    return _before_instruction(m, data, m.random.choice(OPCODES) + m.random.randbytes(m.random.choice([0, 0, 1, 4])))


PICKLE_CHANGES = [_gadget, _gadget, _instead, _instruction, _instruction, *BYTE_CHANGES]
