"""Rows that a Python program has: dicts, a data set of the package datasets, or the path of a file or folder.

They are taken in the forms of jsonl.py, and become what JSON would make of them: a program may change its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.config import FileTaskConfig, GivenTaskConfig
from rlhf.tasks.files import task_of
from rlhf.tasks.json_lines import Record, json_records, object_in
from rlhf.tasks.raw import RawTask
from rlhf.tasks.source import Source, reading
from transfer.agreement.shown import one_line, shown

LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
ROWS = "a list of dicts, an iterable of them, a datasets.Dataset, or the path of a file or folder"


def given_task(config: GivenTaskConfig, seed: int, data: Any = None, held_out: Any = None) -> RawTask:
    """The task of these rows; ValueError says what is wrong with them, by their places."""
    if data is None:
        raise ValueError(
            "task=given takes its rows from a Python program, rlhf.train(config, data=rows): give them there, or "
            "choose task=jsonl task.path=FILE"
        )
    return task_of(config, seed, *sources_of(config, data, held_out))


def sources_of(config: FileTaskConfig, data: Any, held_out: Any = None) -> list[Source]:
    """Where the rows come from, and those that are held out, if the program gives some; ValueError if that has none."""
    sources = [_source(config, data, "data")]
    if held_out is not None:
        sources.append(_source(config, held_out, "held_out"))
    return sources


def _source(config: FileTaskConfig, rows: Any, key: str) -> Source:
    """Where the rows of an argument come from; ValueError if it is none of what has rows."""
    if isinstance(rows, (str, os.PathLike)):
        return _of_path(config, os.fspath(rows), key)
    if (package := sys.modules.get("datasets")) is not None:
        if isinstance(rows, package.Dataset):
            return _of_data_set(config, rows, key)
        if isinstance(rows, (package.DatasetDict, package.IterableDatasetDict)):
            raise ValueError(f"{key}= is a data set of several splits: give one of them ({', '.join(map(str, rows))})")
    if isinstance(rows, (Mapping, bytes)) or not isinstance(rows, Iterable) or hasattr(rows, "columns"):
        raise ValueError(f"{key}= must be {ROWS} (got {type(rows).__name__})")
    return Source(key, key, _records(rows, key), "rows like {'prompt': ...}")


def _of_path(config: FileTaskConfig, path: str, key: str) -> Source:
    """A file of JSON as task=jsonl reads it, whatever else as task=hf does."""
    if Path(path).name.lower().endswith(LINES):
        return Source(path, key, json_records(path, key))
    from rlhf.tasks.hf import at_path

    with reading(path):
        return at_path(config, path, key)


def _of_data_set(config: FileTaskConfig, rows: Any, key: str) -> Source:
    from rlhf.tasks.hf import Loaded, rows_of

    return rows_of(config, Loaded(key, [key], loaded={key: rows}), key, key, key)


def _records(rows: Iterable[Any], key: str) -> Iterator[Record]:
    for number, row in enumerate(rows):
        yield f"{key}[{number}]", _columns(row)


def _columns(row: Any) -> dict[str, Any] | ValueError:
    """What JSON makes of a row, or what is wrong with it."""
    if not isinstance(row, Mapping):
        return ValueError(f"must be a dict (got {shown(row)})")
    try:
        found = json.loads(json.dumps(dict(row), default=_plain, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        return ValueError(f"JSON cannot have it: {one_line(str(error), 200)}")
    return object_in(found)


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's; TypeError of all else."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{shown(value)} ({type(value).__name__}) is neither text, number, list nor dict")
