"""Files of rows on this machine, of any kind that is read: parquet, arrow, csv, tsv and JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.tasks.arrow_rows import Columns, whole_floats
from rlhf.tasks.csv_rows import csv_records
from rlhf.tasks.formats import ARROW, CSV, PARQUET, STREAM, TSV, kind_of_file, opened
from rlhf.tasks.json_lines import Record, json_records
from transfer.agreement.shown import one_line

if TYPE_CHECKING:
    import pyarrow as pa

END = sys.maxsize
TABLES = (PARQUET, ARROW, STREAM)
AT_ONCE = 1024  # rows


@dataclass(frozen=True, slots=True)
class Files:
    """Splits, each of some files."""

    key: str  # that named them
    files: dict[str, list[str]]

    @property
    def splits(self) -> list[str]:
        """Their names."""
        return list(self.files)

    def count(self, split: str) -> int:
        """Rows of a split."""
        return sum(map(self._count, self.files[split]))

    def records(self, split: str, columns: Columns, low: int, high: int) -> Iterator[Record]:
        """The rows of a split from `low` up to `high`."""
        for path in self.files[split]:
            if high <= 0:
                return
            yield from self._records(path, columns, low, high)
            if (low, high) != (0, END):
                rows = self._count(path)
                low, high = max(low - rows, 0), high - rows

    def whole(self, split: str, name: str) -> bool:
        """Whether a column of tables has floats alone, and all of them whole."""
        paths = self.files[split]
        return all(self._kind(path) in TABLES for path in paths) and whole_floats(
            name, (table for path in paths for table in self._tables(path, [name]))
        )

    def _records(self, path: str, columns: Columns, low: int, high: int) -> Iterator[Record]:
        kind = self._kind(path)
        if kind in TABLES:
            yield from columns.records(self._tables(path), path, low, high)
        else:
            rows = csv_records(path, self.key, kind) if kind in (CSV, TSV) else json_records(path, self.key)
            yield from islice(rows, low, high)

    def _kind(self, path: str) -> str:
        with opened(path, self.key) as file:
            head = file.head()
        kind = kind_of_file(path, head)
        if not kind and head.strip() and head.lstrip()[:1] not in (b"{", b"["):
            raise ValueError(
                f"{path}: that is no file that task=hf reads: {self.key} takes parquet, arrow, csv, tsv and JSON"
            )
        return kind

    def _count(self, path: str) -> int:
        if self._kind(path) in TABLES:
            return sum(table.num_rows for table in self._tables(path, []))
        return sum(1 for _ in self._records(path, Columns(), 0, END))

    def _tables(self, path: str, names: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """A file's tables, of parquet with these columns alone; ValueError where the file is damaged."""
        import pyarrow as pa

        place, kind = str(Path(path).expanduser()), self._kind(path)
        try:
            with ExitStack() as stack:
                for table in _batches(place, kind, names, stack):
                    table.validate(full=True)  # pyarrow itself trusts what a file says of its lengths
                    _ = table.schema.names  # nor does it look at these, whose bytes may be no text
                    yield table
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise ValueError(f"{self.key}: cannot read {path}: {one_line(str(error), 300)}") from None


def _batches(place: str, kind: str, names: Sequence[str] | None, stack: ExitStack) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    if kind == PARQUET:
        from pyarrow.parquet import ParquetFile

        yield from stack.enter_context(ParquetFile(place)).iter_batches(AT_ONCE, columns=names)
        return
    source = stack.enter_context(pa.memory_map(place))
    if kind == STREAM:
        yield from stack.enter_context(pa.ipc.open_stream(source))
        return
    batches = stack.enter_context(pa.ipc.open_file(source))
    for number in range(batches.num_record_batches):
        yield batches.get_batch(number)


def files_at(path: str, key: str) -> Files:
    """One file, or those that match a pattern; their split is `train`, as datasets has it."""
    if "://" in path:
        raise ValueError(f"{key}: {path} is an address: task=hf takes files, folders and names of the Hugging Face hub")
    place = Path(path).expanduser()
    matching = sorted(glob(str(place))) if has_magic(path) and not place.exists() else []
    return Files(key, {"train": matching or [path]})


def names_file(path: str) -> bool:
    """Whether something that is not there can only be a file, not a name of the hub."""
    ends = path.lower().removesuffix(".gz").endswith((".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl"))
    return ends or path.startswith((".", "~", "/")) or path.count("/") > 1 or has_magic(path)
