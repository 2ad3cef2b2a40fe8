"""Reads the pickles that legacy peers send as `ipc_handles_pickled`, without running anything that they contain.

A pickle is a program for a stack machine. This is an interpreter of the few instructions that put together lists,
dicts, tuples, numbers, strings and bytes (protocols 2 to 5). A global is never looked up: it becomes a `Global`, a mere
name, and only if the name is in `GLOBALS`. Nothing is called: the two calls that honest payloads contain,
`torch.Size(tuple)` and protocol 2's spelling of bytes, are worked out here. Any other instruction, name or call is
refused, and so is what is too large, too deep or refers to itself. A pickle may hold one value in many places: what it
would be if each place had its own is bounded, too, for whoever walks it. Standard library only.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transfer.agreement.shown import shown

MAX_BYTES = 8 * 2**20
MAX_STEPS = 2**20  # instructions; bounds the memory that small instructions can ask for
MAX_ENCODED = 4096  # characters of one protocol-2 bytes; of all together, no more than the pickle has
MAX_CONTAINERS = 2**17  # lists, dicts and tuples; a tensor's handle has 5 or 6, and a byte of input can make one
MAX_WEIGHT = 2 * MAX_BYTES  # values and their characters, each counted as often as it occurs; honest ones have a third
MAX_DEPTH = 8  # containers inside containers; a list of dicts of (function, fields with a size) has 5

DTYPE_BYTES = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
    "complex128": 16,
}  # the dtypes that travel, by torch's names, and their sizes

SIZE = "torch.Size"
ENCODE = "_codecs.encode"
GLOBALS = frozenset(
    {
        SIZE,
        ENCODE,
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
        "torch.multiprocessing.reductions.rebuild_cuda_tensor",
        *(f"torch.{name}" for name in DTYPE_BYTES),
    }
)


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class, dtype or function in a pickle, for comparing; nothing can be called through it."""

    name: str


def loads(data: bytes) -> Any:
    """The value that `data` describes; ValueError, with the place, for all but plain values and known names."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"the pickled handles have {len(data)} bytes, at most {MAX_BYTES} are read")
    reader = _Reader(data)
    try:
        return reader.run()
    except (ValueError, IndexError) as error:
        raise ValueError(f"the pickled handles are refused at byte {reader.at}: {error}") from None


_MARK = object()


class _Reader:
    """The stack machine. A container is open while it is filled and closes when it is put into another, for good."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.depth: dict[int, int] = {}  # of each list, dict and tuple, by id
        self.weight: dict[int, int] = {}  # the same, of all that is in it
        self.encoded = 0  # bytes that calls have made
        self.open: set[int] = set()  # ids of the lists and dicts that may still grow

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            code = self.take(1)
            if code == b".":
                return self.result()
            step = _STEPS.get(code)
            if step is None:
                raise ValueError(f"instruction {code!r} is not allowed")
            step(self)
            if len(self.depth) > MAX_CONTAINERS:
                raise ValueError(f"more than {MAX_CONTAINERS} lists, dicts and tuples")
        raise ValueError(f"more than {MAX_STEPS} instructions")

    def result(self) -> Any:
        if len(self.stack) != 1 or self.at != len(self.data):
            raise ValueError("it must hold one value and end there")
        return self.value(self.stack[0])

    # --- input

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("it is cut short")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        text = self.take(end - self.at).decode()
        self.take(1)
        return text

    # --- stack

    def value(self, item: Any) -> Any:
        if item is _MARK:
            raise ValueError("a mark stands where a value belongs")
        return item

    def pop(self) -> Any:
        return self.value(self.stack.pop())

    def pop_to_mark(self) -> list[Any]:
        where = len(self.stack)
        while self.stack[where - 1] is not _MARK:
            where -= 1
            if where == 0:
                raise ValueError("a mark is missing")
        items = self.stack[where:]
        del self.stack[where - 1 :]
        return items

    # --- containers

    def push_container(self, container: list[Any] | dict[str, Any]) -> None:
        self.depth[id(container)] = self.weight[id(container)] = 1
        self.open.add(id(container))
        self.stack.append(container)

    def push_tuple(self, items: list[Any]) -> None:
        made = tuple(items)
        self.depth[id(made)] = self.weight[id(made)] = 1
        self.open.discard(id(made))
        self.put_into(made, items)
        self.stack.append(made)

    def put_into(self, container: Any, items: list[Any]) -> None:
        """Close the containers among `items`, of which `container` now is one level above."""
        depth, weight = self.depth[id(container)], self.weight[id(container)]
        for item in items:
            if isinstance(item, list | dict | tuple):
                self.open.discard(id(item))
                depth, weight = max(depth, 1 + self.depth[id(item)]), weight + self.weight[id(item)]
            else:
                weight += 1 + (len(item) if isinstance(item, str | bytes) else 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} containers inside each other")
        if weight > MAX_WEIGHT:
            raise ValueError(f"more than {MAX_WEIGHT} values and characters, each counted as often as it occurs")
        self.depth[id(container)], self.weight[id(container)] = depth, weight

    def extend(self, items: list[Any]) -> None:
        target = self.growing(list)
        self.put_into(target, items)
        self.growing(list).extend(items)

    def update(self, pairs: list[Any]) -> None:
        target = self.growing(dict)
        keys, values = pairs[::2], pairs[1::2]
        if len(keys) != len(values) or not all(isinstance(key, str) for key in keys):
            raise ValueError("a dict needs pairs of a string and a value")
        self.put_into(target, pairs)
        self.growing(dict).update(zip(keys, values, strict=True))

    def growing(self, kind: type) -> Any:
        """The container on top of the stack; once it is inside another (itself, even) it may not grow."""
        target = self.stack[-1]
        if type(target) is not kind or id(target) not in self.open:
            raise ValueError(f"there is no {kind.__name__} to add to")
        return target

    # --- names and calls

    def push_global(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"
        if full not in GLOBALS:
            raise ValueError(f"the name {shown(full)} is not allowed")
        self.stack.append(Global(full))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        match function, arguments:
            case Global(name=name), (tuple() as size,) if name == SIZE:
                self.stack.append(size)
            case Global(name=name), (str() as text, "latin1") if name == ENCODE and len(text) <= MAX_ENCODED:
                self.encoded += len(text)
                if self.encoded > len(self.data):
                    raise ValueError("more bytes are encoded than it has")
                self.stack.append(text.encode("latin1"))
            case _:
                raise ValueError("a call is not allowed")

    # --- memo

    def remember(self, index: int) -> None:
        self.memo[index] = self.value(self.stack[-1])

    def recall(self, index: int) -> Any:
        if index not in self.memo:
            raise ValueError(f"nothing was remembered as {index}")
        return self.memo[index]


def _pushing(read: Callable[[_Reader], Any]) -> Callable[[_Reader], None]:
    return lambda reader: reader.stack.append(read(reader))


def _sized(layout: str) -> Callable[[_Reader], bytes]:
    return lambda reader: reader.take(reader.number(layout))


def _long(reader: _Reader) -> int:
    return int.from_bytes(_sized("<B")(reader), "little", signed=True)


def _swapped_global(reader: _Reader) -> None:
    name, module = reader.pop(), reader.pop()
    reader.push_global(module, name)


def _pair(reader: _Reader) -> None:
    value, key = reader.pop(), reader.pop()
    reader.update([key, value])


def _tuple(count: int) -> Callable[[_Reader], None]:
    return lambda reader: reader.push_tuple([reader.pop() for _ in range(count)][::-1])


def _protocol(reader: _Reader) -> None:
    version = reader.number("<B")
    if not 2 <= version <= 5:
        raise ValueError(f"protocol {version} is not read, protocols 2 to 5 are")


def _frame(reader: _Reader) -> None:
    reader.number("<Q")  # a hint for buffering


_STEPS: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"(": _pushing(lambda reader: _MARK),
    b"N": _pushing(lambda reader: None),
    b"\x88": _pushing(lambda reader: True),
    b"\x89": _pushing(lambda reader: False),
    b"J": _pushing(lambda reader: reader.number("<i")),
    b"K": _pushing(lambda reader: reader.number("<B")),
    b"M": _pushing(lambda reader: reader.number("<H")),
    b"\x8a": _pushing(_long),
    b"G": _pushing(lambda reader: reader.number(">d")),
    b"\x8c": _pushing(lambda reader: _sized("<B")(reader).decode()),
    b"X": _pushing(lambda reader: _sized("<I")(reader).decode()),
    b"\x8d": _pushing(lambda reader: _sized("<Q")(reader).decode()),
    b"C": _pushing(_sized("<B")),
    b"B": _pushing(_sized("<I")),
    b"\x8e": _pushing(_sized("<Q")),
    b"]": lambda reader: reader.push_container([]),
    b"}": lambda reader: reader.push_container({}),
    b"a": lambda reader: reader.extend([reader.pop()]),
    b"e": lambda reader: reader.extend(reader.pop_to_mark()),
    b"s": _pair,
    b"u": lambda reader: reader.update(reader.pop_to_mark()),
    b")": _tuple(0),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"t": lambda reader: reader.push_tuple(reader.pop_to_mark()),
    b"c": lambda reader: reader.push_global(reader.line(), reader.line()),
    b"\x93": _swapped_global,
    b"R": lambda reader: reader.reduce(),
    b"q": lambda reader: reader.remember(reader.number("<B")),
    b"r": lambda reader: reader.remember(reader.number("<I")),
    b"\x94": lambda reader: reader.remember(len(reader.memo)),
    b"h": _pushing(lambda reader: reader.recall(reader.number("<B"))),
    b"j": _pushing(lambda reader: reader.recall(reader.number("<I"))),
}
