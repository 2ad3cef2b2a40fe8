"""A sweep's tables: what was tried, best first, over its seeds; and every job, also those that failed."""

from __future__ import annotations

import csv
import io
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import Objective
from rlhf.reports.comparison import Line, lines_of, plot_comparison
from rlhf.reports.run_folder import RunFolder, read_run, runs_below
from rlhf.reports.summary import is_number, mean_of

COLUMNS = (
    "reward_end",
    "gold_end",
    "greedy_accuracy_end",
    "kl_end",
    "step_ms",
    "transfer_ms",
    "transfer_share",
    "seconds",
)
DEFAULT = (Objective.gold, Objective.reward, Objective.pair_accuracy)  # the first that a finished run has measured


@dataclass(frozen=True, slots=True)
class Place:
    """One thing that was tried; its numbers are those of the runs that have finished."""

    line: Line
    finished: Sequence[Mapping[str, Any]]  # their summaries

    def values(self, name: str) -> list[float]:
        """One number of each finished run that has it."""
        there = (summary.get(name) for summary in self.finished)
        return [value for value in there if is_number(value) and math.isfinite(value)]

    def mean(self, name: str) -> float | None:
        """Over the seeds; None of nothing."""
        values = self.values(name)
        return mean_of(values) if values else None

    def spread(self, name: str) -> float | None:
        """The standard deviation over the seeds, of a sample; None of fewer than two."""
        values = self.values(name)
        try:
            return statistics.stdev(values) if len(values) > 1 else None
        except OverflowError:
            return math.inf


def leaderboard(runs: Sequence[RunFolder], objective: Objective | None = None) -> tuple[str, list[Place]]:
    """The name of the number that is sorted by, and everything that was tried, best first and what has none last."""
    _, lines = lines_of(runs)
    places = [Place(line, [run.summary for run in line.runs if run.status == "finished"]) for line in lines]
    chosen = objective or _told(runs) or next((o for o in DEFAULT if any(p.values(o.key) for p in places)), DEFAULT[0])
    name = chosen.key
    if chosen is Objective.pass_at_k:
        ks = [key for place in places for summary in place.finished for key in summary if key.startswith("pass_at_")]
        name = next((key for key in reversed(ks) if key.endswith("_end")), name)
    sign = 1 if chosen.smaller_is_better else -1
    placed = [(place.mean(name), place) for place in places]
    ranked = sorted((pair for pair in placed if pair[0] is not None), key=lambda pair: sign * pair[0])  # type: ignore[operator]
    return name, [place for _, place in ranked] + [place for mean, place in placed if mean is None]


def _told(runs: Sequence[RunFolder]) -> Objective | None:
    """The objective that the first run of a sweep was given."""
    names = [str(run.config["objective"]) for run in runs if run.config.get("objective")]
    return Objective(names[0]) if names and names[0] in [each.value for each in Objective] else None


def write_tables(sweep: Path, objective: Objective | None = None) -> int:
    """Read every job's folder below `sweep`, rewrite tables and plot, and say how many jobs there are."""
    runs = [read_run(path) for path in runs_below(sweep)]
    _replace(sweep / "summary.csv", _csv(_jobs(runs, sweep)))
    name, places = leaderboard(runs, objective)
    _replace(sweep / "leaderboard.csv", _csv(_numbers(name, places)))
    common, _ = lines_of(runs)
    told = f"Every job was told `{' '.join(common)}`.\n\n" if common else ""
    best = f"## By {name}: mean ± standard deviation over seeds\n\n{_markdown(shown(name, places))}"
    _replace(sweep / "summary.md", f"# Sweep\n\n{told}{best}\n## Jobs\n\n{_markdown(_jobs(runs, sweep))}")
    partial = sweep / f".comparison-{os.getpid()}.png"
    plot_comparison(runs, partial)
    partial.replace(sweep / "comparison.png")
    return len(runs)


def columns(name: str) -> list[str]:
    """The leaderboard's numbers, the one that it is sorted by first."""
    return [name, *(column for column in COLUMNS if column != name)]


def shown(name: str, places: Sequence[Place]) -> list[dict[str, str]]:
    """The leaderboard for readers: a row a place."""
    rows = []
    for number, place in enumerate(places, start=1):
        ranked = place.mean(name) is not None
        row = {"": str(number) if ranked else "-", "tried": place.line.label, "runs": _count(place)}
        rows.append(row | {column: _with_spread(place, column) for column in columns(name)})
    return rows


def _numbers(name: str, places: Sequence[Place]) -> list[dict[str, Any]]:
    """The leaderboard for programs."""
    rows = []
    for place in places:
        row: dict[str, Any] = {"tried": place.line.label, "runs": len(place.line.runs), "finished": len(place.finished)}
        for column in columns(name):
            row |= {column: place.mean(column), f"{column}_std": place.spread(column)}
        rows.append(row)
    return rows


def _jobs(runs: Sequence[RunFolder], sweep: Path) -> list[dict[str, Any]]:
    return [
        {"job": run.path.relative_to(sweep).as_posix(), "status": run.status, "overrides": " ".join(run.overrides)}
        | {name: run.summary.get(name, "") for name in COLUMNS}
        | {"error": run.error}
        for run in runs
    ]


def _count(place: Place) -> str:
    done, every = len(place.finished), len(place.line.runs)
    return str(every) if done == every else f"{done} of {every}"


def _with_spread(place: Place, name: str) -> str:
    mean, spread = place.mean(name), place.spread(name)
    if mean is None:
        return ""
    return f"{mean:.4g}" + ("" if spread is None else f" ± {spread:.2g}")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "none yet\n"
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _replace(path: Path, text: str) -> None:
    """Write in one go: jobs that end at the same moment, in processes of a launcher, rewrite the same files."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
