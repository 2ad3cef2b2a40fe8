"""What a run has left in its folder, read back; a run that was killed in the middle of a line is read up to there."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.reports.lanes import FILE as LANES
from rlhf.reports.lanes import History, history
from rlhf.reports.summary import Rows, is_number, read_summary

LAST = 2**53  # step that a float tells from the one before
SCORES = ("reward", "gold")  # of a sample


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run that was started there, finished or not."""

    path: Path
    rows: Rows  # of metrics.jsonl
    summary: Mapping[str, Any]
    overrides: Sequence[str]
    config: Mapping[str, Any]  # the composed run, with dotted keys; empty where Hydra has written none

    @property
    def status(self) -> str:
        """finished, failed, interrupted, or unfinished: it runs, or was killed."""
        return str(self.summary.get("status", "unfinished"))

    @property
    def error(self) -> str:
        """The last line of what ended it, if it failed."""
        lines = [line.strip() for line in str(self.summary.get("error", "")).splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def samples(self) -> list[dict[str, Any]]:
        """The rows of samples.jsonl that have a step; a reward or gold that is no number is none."""
        rows = [row for row in json_lines(self.path / "samples.jsonl") if is_number(row.get("step"))]
        return [row | {name: row.get(name) if is_number(row.get(name)) else None for name in SCORES} for row in rows]

    def lanes(self) -> History:
        """Who did what when."""
        return history(json_lines(self.path / LANES))


def read_run(path: Path) -> RunFolder:
    """Everything but the samples, which may be many."""
    summary = read_summary(path)
    overrides = summary.get("overrides") or _yaml(path / ".hydra" / "overrides.yaml")
    config = _yaml(path / ".hydra" / "config.yaml")
    rows = [row for row in map(_measured, json_lines(path / "metrics.jsonl")) if "step" in row]
    told = [str(word) for word in overrides] if isinstance(overrides, list) else []
    return RunFolder(path, rows, summary, told, flat(config) if isinstance(config, dict) else {})


def runs_below(folder: Path) -> list[Path]:
    """The runs of a sweep, in the order of their numbers; its `subdir` may have folders within folders."""
    found: list[Path] = []
    for place, below, _ in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        here = [name for name in below if (Path(place, name) / ".hydra" / "config.yaml").is_file()]
        found += [Path(place, name) for name in here]
        below[:] = [name for name in below if name not in here]  # a run's own folders hold no other
    return sorted(found, key=lambda job: [_number(part) for part in job.relative_to(folder).parts])


def is_run(folder: Path) -> bool:
    """Whether a run was started there."""
    return any((folder / name).exists() for name in (".hydra/config.yaml", "metrics.jsonl", "summary.json"))


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


def _measured(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers; without a step that is one, nothing can be said of it."""
    numbers = {name: value for name, value in row.items() if is_number(value)}
    return numbers if abs(numbers.get("step", math.nan)) <= LAST else {}


def _number(name: str) -> tuple[int, str]:
    return (int(name) if name.isdecimal() else 10**9, name)


def _yaml(path: Path) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        return None
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException):  # none that Hydra has written
        return None


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, up to one that was not written to its end."""
    if not path.is_file():  # a FIFO would never end
        return []
    try:
        return objects(path.read_text(encoding="utf-8", errors="replace").splitlines())
    except OSError:
        return []


def objects(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Those that the lines are, one each, up to the first that is none."""
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows
