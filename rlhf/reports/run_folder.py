"""What a run has left in its folder, read back; a run that was killed in the middle of a line is read up to there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.reports.summary import Rows, read_summary


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
        """The rows of samples.jsonl."""
        return _lines(self.path / "samples.jsonl")


def read_run(path: Path) -> RunFolder:
    """Everything but the samples, which may be many."""
    summary = read_summary(path)
    overrides = summary.get("overrides") or _yaml(path / ".hydra" / "overrides.yaml") or []
    config = _yaml(path / ".hydra" / "config.yaml")
    return RunFolder(path, _lines(path / "metrics.jsonl"), summary, list(overrides), flat(config or {}))


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


def _number(name: str) -> tuple[int, str]:
    return (int(name) if name.isdecimal() else 10**9, name)


def _yaml(path: Path) -> Any:
    from omegaconf import OmegaConf

    if not path.exists():
        return None
    return OmegaConf.to_container(OmegaConf.load(path))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, up to one that was not written to its end."""
    rows: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return rows
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows
