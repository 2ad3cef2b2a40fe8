"""The weights as a plan: names, dtypes, shapes, aligned offsets and aliases; compare two and list the differences.

Entries are ordered by name and offsets follow from that order, so two sides that agree on names, dtypes, shapes and
aliases agree on where every byte lies, whatever the order of their modules.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from transfer.agreement.dtensor import is_dtensor, local_part
from transfer.agreement.shown import shown

ALIGNMENT = 256  # bytes; keeps every dtype aligned, also behind odd-sized tensors
MAX_BYTES = 2**48  # of one tensor: more is a hostile or broken message
MAX_DIMS = 64  # of one tensor, as torch has it
LISTED = 10  # differences shown

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: `nbytes` bytes at `offset`; `aliases` are further names of the same memory (tied weights)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...]
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        return DTYPES[self.dtype]

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class Manifest:
    """All tensors of a model, ordered by name; `nbytes` is the end of the last one, from 0."""

    entries: tuple[Entry, ...]
    nbytes: int

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> Manifest:
        """The plan for `weights`; floating-point tensors travel as `dtype` if given; ValueError if one cannot.

        A DTensor counts as the whole tensor.
        """
        return cls._grouped(weights, dtype, _identity)

    @classmethod
    def planned(cls, weights: Mapping[str, torch.Tensor]) -> Manifest:
        """The plan for tensors on the meta device, which have no memory: two names of one tensor object are tied."""
        return cls._grouped(weights, None, lambda name, tensor: id(tensor))

    @classmethod
    def _grouped(
        cls,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None,
        identity: Callable[[str, torch.Tensor], Any],
    ) -> Manifest:
        groups: dict[Any, list[str]] = {}
        for name in sorted(weights):
            groups.setdefault(identity(name, weights[name]), []).append(name)
        return cls._laid_out(
            (first, _dtype_name(first, weights[first], dtype), tuple(weights[first].shape), tuple(aliases))
            for first, *aliases in groups.values()
        )

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """Read what `to_json` wrote; ValueError, naming the entry, on anything else."""
        if not isinstance(value, dict) or set(value) != {"entries"} or not isinstance(value["entries"], list):
            raise ValueError('a manifest must be like {"entries": [[name, dtype, shape, aliases], ...]}')
        rows = [_checked_row(index, row) for index, row in enumerate(value["entries"])]
        names = [name for row in rows for name in (row[0], *row[3])]
        if len(set(names)) != len(names):
            raise ValueError("a manifest must name every tensor once")
        if [row[0] for row in rows] != sorted(row[0] for row in rows):
            raise ValueError("a manifest's entries must be ordered by name")
        return cls._laid_out(rows)

    @classmethod
    def _laid_out(cls, rows: Iterable[tuple[str, str, tuple[int, ...], tuple[str, ...]]]) -> Manifest:
        entries, offset, end = [], 0, 0
        for name, dtype, shape, aliases in rows:
            nbytes = math.prod(shape) * DTYPES[dtype].itemsize
            entries.append(Entry(name, dtype, shape, aliases, offset, nbytes))
            end = offset + nbytes
            offset = round_up(end, ALIGNMENT)
        return cls(tuple(entries), end)

    def reshaped(self, shapes: Iterable[tuple[int, ...]]) -> Manifest:
        """The same entries with other shapes, one an entry, laid out anew."""
        rows = zip(self.entries, shapes, strict=True)
        return self._laid_out((entry.name, entry.dtype, shape, entry.aliases) for entry, shape in rows)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; offsets and sizes follow from it."""
        return {"entries": [[e.name, e.dtype, list(e.shape), list(e.aliases)] for e in self.entries]}

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON, in hex: equal if and only if the plans are."""
        return hashlib.sha256(json.dumps(self.to_json(), separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def by_name(self) -> dict[str, Entry]:
        """Every name, aliases included, to its entry."""
        return {name: entry for entry in self.entries for name in entry.names}

    def floating_dtype(self) -> str | None:
        """The one dtype of all floating-point tensors; None if there are several, or none."""
        found = {entry.dtype for entry in self.entries if entry.torch_dtype.is_floating_point}
        return found.pop() if len(found) == 1 else None

    def differences(self, other: Manifest) -> list[str]:
        """How `other` differs from this plan, a line each, the first ten and a count of the rest; [] if it does not."""
        lines = [line for name in sorted({*self.by_name, *other.by_name}) for line in self._compared(name, other)]
        rest = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        return lines[:LISTED] + rest

    def _compared(self, name: str, other: Manifest) -> list[str]:
        mine, theirs = self.by_name.get(name), other.by_name.get(name)
        if theirs is None:
            return [f"missing: {name}"]
        if mine is None:
            return [f"unexpected: {name}"]
        lines = []
        if mine.shape != theirs.shape:
            lines.append(f"shape: {name} is {list(theirs.shape)}, not {list(mine.shape)}")
        if mine.dtype != theirs.dtype:
            lines.append(f"dtype: {name} is {theirs.dtype}, not {mine.dtype}")
        if mine.names != theirs.names and set(mine.names) <= set(other.by_name):
            lines.append(f"alias: {name} is tied as {list(theirs.names)}, not {list(mine.names)}")
        return lines


def same_tensors(given: Collection[torch.Tensor], known: Collection[torch.Tensor]) -> bool:
    """Whether these are the very same objects, in the same order."""
    return len(given) == len(known) and all(map(operator.is_, given, known))


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not below `number`."""
    return -(-number // multiple) * multiple


def _identity(name: str, tensor: torch.Tensor) -> Any:
    """What two names of one tensor have in common; an empty tensor has no memory to share.

    A DTensor has no address of its own: two names of one have the part in common that this rank holds.
    """
    if is_dtensor(tensor):
        return _identity(name, local_part(tensor)), tuple(tensor.shape)
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise ValueError(
            f"{name} must be a plain tensor with memory of its own, not {tensor.layout} on {tensor.device}"
        )
    if tensor.numel() == 0:
        return name
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _dtype_name(name: str, tensor: torch.Tensor, cast: torch.dtype | None) -> str:
    dtype = cast if cast is not None and tensor.is_floating_point() else tensor.dtype
    text = str(dtype).removeprefix("torch.")
    if text not in DTYPES:
        raise ValueError(f"{name} has dtype {text}, which cannot be sent; allowed: {', '.join(DTYPES)}")
    return text


def _checked_row(index: int, row: Any) -> tuple[str, str, tuple[int, ...], tuple[str, ...]]:
    match row:
        case [str(name), str(dtype), list(shape), list(aliases)] if (
            dtype in DTYPES
            and len(shape) <= MAX_DIMS
            and all(type(size) is int and 0 <= size <= MAX_BYTES for size in shape)
            and math.prod(max(1, size) for size in shape) * DTYPES[dtype].itemsize <= MAX_BYTES
            and all(isinstance(alias, str) for alias in aliases)
        ):
            return name, dtype, tuple(shape), tuple(aliases)
    raise ValueError(f"entry {index} of a manifest must be [name, dtype, shape, aliases], not {shown(row, 120)}")
