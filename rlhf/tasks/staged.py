"""task=environment: rows of a file, a data set or the class itself, and the class that each gets an instance of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.config.task import EnvironmentTaskConfig, HfTaskConfig
from rlhf.environments.factory import Factory
from rlhf.tasks import given
from rlhf.tasks.files import json_sources, task_of
from rlhf.tasks.json_lines import Record
from rlhf.tasks.raw import RawTask, Stage
from rlhf.tasks.source import Source, reading

JSON = (".jsonl", ".json", ".gz")


def environment_task(config: EnvironmentTaskConfig, seed: int, *rows: Any) -> RawTask:
    """ValueError says what is wrong with the class, or with its rows; `rows`: a Python program's (given.py)."""
    factory = Factory.of(config.factory, config.tools)
    if not factory.plays:
        config = replace(config, chat=True)  # calls of tools are messages
    raw = task_of(config, seed, *(given.sources_of(config, *rows) if rows else _sources(config, factory)))
    gold = unplayed if factory.plays or factory.has("get_reward") else raw.gold
    return replace(raw, gold=gold, stage=Stage(config, factory))


def _sources(config: EnvironmentTaskConfig, factory: Factory) -> list[Source]:
    if not config.path:
        rows = factory.rows()
        if rows is None:
            raise ValueError(f"task.path is not set, and {config.factory} has no rows(): give one of the two")
        return [Source(f"rows() of {config.factory}", "task.factory", _records(rows), "a class whose rows() are some")]
    return sources_at(config)


def sources_at(config: HfTaskConfig) -> list[Source]:
    """The rows of `task.path`, a file of JSON or a data set, and of held-out rows, if they are apart."""
    if Path(config.path).suffix in JSON:
        return json_sources(config)
    from rlhf.tasks.hf import sources_of

    with reading(config.path):
        return list(sources_of(config))


def _records(rows: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        good = isinstance(row, Mapping)
        yield f"row {number}", dict(row) if good else ValueError(f"must be a dict, not {type(row).__name__}")


def unplayed(columns: Mapping[str, Any], answer: str) -> float:
    """There is a score of every row, and it is what its episode will tell."""
    return 0.0
