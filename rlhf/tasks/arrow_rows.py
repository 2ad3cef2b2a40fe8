"""Rows of Arrow tables, which parquet files, data sets and their caches are read as, in the values that JSON has.

A table's struct has every key in each row: one that is null is absent. Dates are texts (ISO 8601), decimals numbers,
and numbers that are not finite null. What JSON cannot have, bytes and images, is left out, and named once it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf.tasks.json_lines import Record
from transfer.agreement.shown import one_line

if TYPE_CHECKING:
    import pyarrow as pa

Change = Callable[[Any], Any] | None  # of a value that is not null; None: it stays as it is


INDEX = "__index_level_"  # what pandas calls the numbers of its rows
AT_ONCE = 1024  # rows that are Python's at once, before each becomes a task's


class NoJsonError(Exception):
    """A type whose values JSON cannot have."""


@dataclass(slots=True)
class Columns:
    """What is done with a table's columns."""

    needed: frozenset[str] = frozenset()  # which are a row's form, so that none of them can be left out
    whole: frozenset[str] = frozenset()  # floats that are all whole numbers
    left_out: dict[str, str] = field(default_factory=dict)  # a column, or a key in one, and its type

    def records(self, tables: Iterable[pa.Table | pa.RecordBatch], where: str, low: int, high: int) -> Iterator[Record]:
        """The rows from `low` up to `high`; ValueError where a needed column is no JSON."""
        at = 0
        for table in tables:
            if at >= high:
                return
            first, last = max(low - at, 0), min(high - at, table.num_rows)
            for start in range(first, last, AT_ONCE):
                yield from self._records(table.slice(start, min(AT_ONCE, last - start)), where, at + start)
            at += table.num_rows

    def _records(self, table: pa.Table | pa.RecordBatch, where: str, first: int) -> Iterator[Record]:
        names, values = [], []
        for field_of, column in zip(table.schema, table.columns, strict=True):
            if field_of.name.startswith(INDEX):
                continue
            try:
                change = self._change(field_of.type, field_of.name)
            except NoJsonError:
                if field_of.name in self.needed:
                    raise ValueError(
                        f"{where}: the column {field_of.name!r} is of type {field_of.type}, and must be of texts, "
                        "messages or numbers: write it anew, or name another one in task.columns"
                    ) from None
                self.left_out.setdefault(field_of.name, str(field_of.type))
                continue
            if field_of.name in self.whole:
                change = _whole
            names.append(field_of.name)
            values.append(_values(column, change, f"{where}: the column {field_of.name!r}"))
        for number, row in enumerate(zip(*values, strict=True), start=first):
            yield f"{where} row {number}", dict(zip(names, row, strict=True))

    def _change(self, kind: pa.DataType, name: str) -> Change:
        """What makes JSON of a value of this type; NoJsonError where nothing does."""
        import pyarrow as pa
        import pyarrow.types as types

        if isinstance(kind, pa.BaseExtensionType):
            return _parsed if kind.extension_name == "arrow.json" else self._change(kind.storage_type, name)
        if types.is_dictionary(kind):
            return self._change(kind.value_type, name)
        if types.is_struct(kind):
            return self._of_struct(kind, name)
        if types.is_map(kind):
            return self._of_map(kind, name)
        if any(test(kind) for test in (types.is_list, types.is_large_list, types.is_fixed_size_list)) or (
            types.is_list_view(kind) or types.is_large_list_view(kind)
        ):
            return _each(self._change(kind.value_type, name))
        return _of_scalar(kind)

    def _of_struct(self, kind: pa.StructType, name: str) -> Change:
        if {"bytes", "path"} == {part.name for part in kind}:  # an image, a sound
            raise NoJsonError
        changes: dict[str, Change] = {}
        for part in kind:
            try:
                changes[part.name] = self._change(part.type, f"{name}.{part.name}")
            except NoJsonError:
                self.left_out.setdefault(f"{name}.{part.name}", str(part.type))
        if kind.num_fields and not changes:
            raise NoJsonError
        return lambda found: {
            key: found[key] if change is None else change(found[key])
            for key, change in changes.items()
            if found[key] is not None
        }

    def _of_map(self, kind: pa.MapType, name: str) -> Change:
        change = self._change(kind.item_type, name)
        return lambda found: {
            str(key): value if change is None else change(value) for key, value in found if value is not None
        }


def _values(column: pa.Array, change: Change, name: str) -> list[Any]:
    """ValueError of what is no value of Python's: a date in the year 10000, JSON that is none."""
    import pyarrow as pa

    try:
        found = column.to_pylist()
        return found if change is None else [None if each is None else change(each) for each in found]
    except (ValueError, OverflowError, RecursionError, pa.ArrowException) as error:
        raise ValueError(f"{name} cannot be read: {one_line(str(error), 200)}") from None


def whole_floats(name: str, tables: Iterable[pa.Table | pa.RecordBatch]) -> bool:
    """Whether a column is of floats that are all whole, as tables write integers of which some are missing."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    some = False
    for table in tables:
        if name not in table.schema.names or not types.is_floating(table.schema.field(name).type):
            return False
        column = table.column(name).drop_null()
        column = column.filter(compute.is_finite(column))
        if not compute.all(compute.equal(column, compute.floor(column)), min_count=0).as_py():
            return False
        some = some or len(column) > 0
    return some


def _of_scalar(kind: pa.DataType) -> Change:
    import pyarrow.types as types

    if any(test(kind) for test in (types.is_integer, types.is_boolean, types.is_null)) or (
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    ):
        return None
    if types.is_floating(kind):
        return _finite
    if types.is_decimal(kind):
        return _number
    if types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind):
        return _iso
    if types.is_duration(kind):
        return str
    raise NoJsonError


def _each(change: Change) -> Change:
    return None if change is None else lambda found: [None if each is None else change(each) for each in found]


def _parsed(text: str) -> Any:
    return json.loads(text)


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


def _whole(number: float) -> int | None:
    return int(number) if math.isfinite(number) else None


def _number(decimal: Any) -> int | float:
    return int(decimal) if decimal == decimal.to_integral_value() else float(decimal)


def _iso(moment: Any) -> str:
    return str(moment.isoformat())
