"""Data sets as the package datasets has them: files, folders of files or of `save_to_disk`, and names of the hub.

What is on this machine is read where it lies (data_files.py): datasets only says which files of a folder are which
split, and no copy goes to its cache. A data set of the hub is loaded, and cached, by datasets.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from rlhf.config import FileTaskConfig, HfTaskConfig
from rlhf.tasks.arrow_rows import Columns, whole_floats
from rlhf.tasks.data_files import END, Files, files_at, names_file
from rlhf.tasks.hub import hub_or_cache
from rlhf.tasks.json_lines import Record
from rlhf.tasks.jsonl import CONVERSATIONS, PREFERENCE
from rlhf.tasks.source import Source
from transfer.agreement.shown import one_line

READ = ("parquet", "arrow", "csv", "json")  # what datasets calls files that are read
OBJECTS = ("reward_model", "chat_template_kwargs")  # columns that are objects
SAYING = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})  # keys of a message
AT_ONCE = 1024  # rows


class DataSet(Protocol):
    """Splits of rows."""

    @property
    def splits(self) -> list[str]: ...

    def count(self, split: str) -> int: ...

    def records(self, split: str, columns: Columns, low: int, high: int) -> Iterator[Record]: ...

    def whole(self, split: str, name: str) -> bool: ...


@dataclass(slots=True)
class Loaded:
    """A data set that datasets has loaded."""

    name: str
    splits: list[str]
    builder: Any = None
    loaded: dict[str, Any] = field(default_factory=dict)

    def load(self) -> None:
        """Fetch all of it from where it comes, or from the cache."""
        self.builder.download_and_prepare()
        self.loaded = {split: self.builder.as_dataset(split) for split in self.splits}

    def count(self, split: str) -> int:
        """Rows of a split."""
        return len(self.loaded[split])

    def records(self, split: str, columns: Columns, low: int, high: int) -> Iterator[Record]:
        """The rows of a split from `low` up to `high`."""
        where = f"{self.name} {split}" if len(self.splits) > 1 else self.name
        return columns.records(self._tables(split), where, low, high)

    def whole(self, split: str, name: str) -> bool:
        """Whether a column has floats alone, and all of them whole."""
        return name in self.loaded[split].column_names and whole_floats(name, self._tables(split, [name]))

    def _tables(self, split: str, names: list[str] | None = None) -> Iterator[Any]:
        rows = self.loaded[split]
        rows = (rows if names is None else rows.select_columns(names)).with_format("arrow")
        for start in range(0, len(rows), AT_ONCE):
            table = rows[start : start + AT_ONCE]
            table.validate(full=True)  # pyarrow itself trusts what a file says of its lengths
            yield table


def sources_of(config: HfTaskConfig) -> list[Source]:
    """Where the rows come from, and, if they have others of their own, those that are held out."""
    _check_package()
    data = _data_set(config.path, config.name, "task.path")
    split = config.split or _only(data, config.path, "task.split", "train")
    sources = [rows_of(config, data, config.path, split, "task.split")]
    if config.held_out_path is not None:
        path = config.held_out_path
        own = _data_set(path, None, "task.held_out_path")
        held = config.held_out_split or _only(own, path, "task.held_out_split")
        sources.append(rows_of(config, own, path, held, "task.held_out_split"))
    elif config.held_out_split is not None:
        sources.append(rows_of(config, data, config.path, config.held_out_split, "task.held_out_split"))
    return sources


def at_path(config: FileTaskConfig, path: str, key: str) -> Source:
    """The rows of the split `train`, or the only one, of what is there."""
    _check_package()
    data = _data_set(path, None, key)
    return rows_of(config, data, path, _only(data, path, key, "train"), key)


def _check_package() -> None:
    """ValueError without the package, which is imported only for what needs it: it takes longer than a file's rows."""
    try:
        there = all(importlib.util.find_spec(name) is not None for name in ("datasets", "pyarrow"))
    except (ImportError, ValueError):  # as a finder says it, or a name that is blocked
        there = False
    if not there:
        raise ValueError(
            "task=hf needs the package datasets: pip install 'rlhf-transfer[data]', or give task=jsonl a file of JSON "
            "lines"
        )


def _package() -> Any:
    """The package, which says nothing: a run has lines of its own."""
    import datasets
    import huggingface_hub.utils.logging as hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    hub.set_verbosity_error()
    return datasets


def _data_set(path: str, name: str | None, key: str) -> DataSet:
    """What is at a path or has a hub's name; ValueError where nothing is."""
    place = Path(path).expanduser()
    try:
        folder, file = place.is_dir(), place.exists()
    except ValueError as error:  # a NUL in the name
        raise ValueError(f"{key}: cannot read {path!r}: {error}") from None
    if folder and not _is_saved(place):
        return _folder(path, place, name, key)
    if name is not None and (folder or file):
        raise ValueError(
            f"task.name is of folders and hub names that have several data sets, and {path} is one: leave it out"
        )
    if folder:
        return _saved(path, place, key)
    if file or names_file(path):
        return files_at(path, key)
    datasets = _package()
    with hub_or_cache(path, key):
        builder = datasets.load_dataset_builder(path, name)
        splits = list(builder.info.splits or builder.config.data_files or ())
        data = Loaded(path, [str(split) for split in splits], builder)
        data.load()
    return data


def _is_saved(place: Path) -> bool:
    """Whether a folder is one of `save_to_disk`."""
    return (place / "dataset_dict.json").is_file() or (
        (place / "dataset_info.json").is_file() and (place / "state.json").is_file()
    )


def _saved(path: str, place: Path, key: str) -> Loaded:
    datasets = _package()
    try:
        found = datasets.load_from_disk(str(place))
    except Exception as error:  # of datasets, of pyarrow, of json: a file of it may be gone or cut
        raise ValueError(f"{key}: cannot read {path} as of save_to_disk: {one_line(str(error), 300)}") from None
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {str(found.split or "train"): found}
    return Loaded(path, [str(split) for split in splits], loaded={str(split): rows for split, rows in splits.items()})


def _folder(path: str, place: Path, name: str | None, key: str) -> Files:
    """The files of a folder by their splits, as datasets finds them by their names or the folder's README."""
    datasets = _package()
    try:
        with TemporaryDirectory() as cache:  # in which a builder makes folders, and nothing else is put
            builder = datasets.load_dataset_builder(str(place), name, cache_dir=cache)
    except Exception as error:  # of datasets, of the YAML of a README, ...
        hint = "; set task.name" if "onfig" in str(error) else ""
        raise ValueError(f"{key}: no data set is in the folder {path}: {one_line(str(error), 300)}{hint}") from None
    if builder.name not in READ:
        raise ValueError(
            f"{key}: the folder {path} has files that datasets reads as {builder.name!r}: task=hf takes parquet, "
            "arrow, csv and JSON"
        )
    return Files(key, {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()})


def _only(data: DataSet, path: str, key: str, otherwise: str = "") -> str:
    """The split that is taken where none is named."""
    if otherwise in data.splits or len(data.splits) == 1:
        return otherwise if otherwise in data.splits else data.splits[0]
    raise ValueError(f"{key} must say which split of {path} to take: {', '.join(data.splits)}")


def rows_of(config: FileTaskConfig, data: DataSet, path: str, split: str, key: str) -> Source:
    """The rows of a split, or of a part of it."""
    answer = config.columns.get(config.answer_column, config.answer_column)
    whole = frozenset({answer}) if _whole(data, split, path, key, answer) else frozenset()
    columns = Columns(frozenset(_names(config, (*_forms(config), config.answer_column))), whole)

    def rows() -> Iterator[Record]:
        for name, low, high in _parts(data, split, path, key):
            yield from data.records(name, columns, low, high)

    def notes() -> list[str]:
        """What was done with columns, once all rows are read."""
        said = [f"{path}: {answer!r} has floats that are all whole: taken as 7, not as 7.0"] if whole else []
        left = ", ".join(f"{name!r} ({kind})" for name, kind in sorted(columns.left_out.items()))
        return [*said, *([f"{path}: columns that are no JSON are left out: {left}"] if left else [])]

    name = path if len(data.splits) == 1 and split in data.splits else f"{path} ({split})"
    return Source(name, key, _unpacked(config, rows()), "a data set that has rows", notes)


def _whole(data: DataSet, split: str, path: str, key: str, answer: str) -> bool:
    return all(data.whole(name, answer) for name, _, _ in _parts(data, split, path, key))


def _parts(data: DataSet, split: str, path: str, key: str) -> Iterator[tuple[str, int, int]]:
    """(name, from, to) of what `split` names: a split, a part of one (train[:1000]), or some added up by `+`."""
    if split in data.splits:
        yield split, 0, END
        return
    names = [part.partition("[")[0].strip() for part in split.split("+")]
    if unknown := [name for name in names if name not in data.splits]:
        raise ValueError(f"{key}: {path} has no split {unknown[0]!r}; its splits: {', '.join(data.splits)}")
    from datasets import ReadInstruction

    try:
        counts = {name: data.count(name) for name in names}
        parts = ReadInstruction.from_spec(split).to_absolute(counts)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{key}={split}: {one_line(str(error), 200)}: write it like train[:1000]") from None
    for part in parts:
        yield part.splitname, part.from_ or 0, counts[part.splitname] if part.to is None else part.to


# --- columns whose texts are JSON, as csv has to write them -----------------------------------------------------------


def _forms(config: FileTaskConfig) -> tuple[str, ...]:
    return (config.prompt_column, "completion", *PREFERENCE, *CONVERSATIONS)


def _names(config: FileTaskConfig, forms: tuple[str, ...]) -> list[str]:
    """What the data call these."""
    return [config.columns.get(form, form) for form in forms]


def _unpacked(config: FileTaskConfig, rows: Iterator[Record]) -> Iterator[Record]:
    """The rows with messages and objects in place of texts that are JSON of them, or Python's way to write them."""
    tests: dict[str, Callable[[Any], bool]] = dict.fromkeys(_names(config, _forms(config)), _are_messages)
    tests |= dict.fromkeys(_names(config, ("tools",)), _are_objects)
    tests |= dict.fromkeys(_names(config, OBJECTS), lambda found: isinstance(found, dict))
    for where, columns in rows:
        if isinstance(columns, dict):
            for name, test in tests.items():
                value = columns.get(name)
                if value is None or (isinstance(value, str) and value[:1] not in ("[", "{")):
                    continue
                found = _value(value)
                if found is not value and test(found):
                    columns[name] = found
        yield where, columns


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _are_messages(value: Any) -> bool:
    return _are_objects(value) and all(any(keys <= each.keys() for keys in SAYING) for each in value)


def _value(found: Any) -> Any:
    """What a text or lists of a message's keys stand for; itself, if it is neither."""
    if isinstance(found, dict) and any(keys <= found.keys() for keys in SAYING):
        return _of_lists(found)
    if not isinstance(found, str):
        return found
    try:
        return json.loads(found)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(found)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return found


def _of_lists(found: dict[str, Any]) -> Any:
    """Messages, of which a table has each key as a list, as datasets wrote what it called a sequence."""
    lists = list(found.values())
    if not all(isinstance(each, list) and len(each) == len(lists[0]) for each in lists):
        return found
    rows = (zip(found, each, strict=True) for each in zip(*lists, strict=True))
    return [{key: value for key, value in row if value is not None} for row in rows]
