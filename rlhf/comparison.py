"""The plot of a sweep: a line for each thing that was tried, over all of its seeds, and where a step's time went."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.report import PHASES, Rows, pyplot, read_summary, series

MEASURES = {  # what the lines are compared by: the first that all of them have
    "eval/gold": "gold reward (held-out prompts)",
    "eval/reward": "reward (held-out prompts)",
    "train/reward": "reward (training prompts)",
}
STYLES = ("-", "--", ":")  # there are ten colours


@dataclass(slots=True)
class Line:
    """The jobs that differ in nothing but their seed."""

    label: str
    runs: list[Rows]

    def curve(self, name: str) -> tuple[list[float], list[list[float]]]:
        """The steps at which every run has measured `name`, and all their values at each."""
        runs = [dict(zip(*series(rows, name), strict=True)) for rows in self.runs]
        steps = sorted(set.intersection(*map(set, runs)))
        return steps, [[values[step] for values in runs] for step in steps]

    def milliseconds(self, phase: str) -> float:
        """The median of what the phase takes of a step."""
        seconds = [second for rows in self.runs for second in series(rows, f"seconds/{phase}")[1]]
        return 1e3 * statistics.median(seconds) if seconds else 0.0


def plot_comparison(jobs: Sequence[Path], path: Path) -> None:
    """Reward over steps, the mean of each line's seeds within their range, beside the milliseconds of a step."""
    common, lines = lines_of({job: read_summary(job).get("overrides", []) for job in jobs})
    plt = pyplot()
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(3, 2), layout="constrained")
    figure.suptitle(" ".join(common), fontsize=10)
    _plot_curves(curves, lines)
    _plot_time(bars, lines)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def lines_of(overrides: dict[Path, list[str]]) -> tuple[list[str], list[Line]]:
    """What all jobs have been told, and the jobs that have metrics as lines, each named by what only it was told."""
    told = [set(words) for words in overrides.values()]
    common = [word for word in next(iter(overrides.values()), []) if all(word in words for words in told)]
    lines: dict[str, Line] = {}
    for job, words in overrides.items():
        own = [word for word in words if word not in common and not word.startswith("seed=")]
        label = " ".join(own) or "seeds"
        if rows := metrics_of(job):
            lines.setdefault(label, Line(label, [])).runs.append(rows)
    return common, list(lines.values())


def _plot_curves(axis: Any, lines: Sequence[Line]) -> None:
    name = next((name for name in MEASURES if lines and all(line.curve(name)[0] for line in lines)), None)
    axis.set(title=MEASURES.get(name or "", ""), xlabel="step")
    axis.grid(alpha=0.3)
    for index, line in enumerate(lines if name else ()):
        steps, values = line.curve(str(name))
        colour = f"C{index % 10}"
        axis.plot(steps, list(map(statistics.fmean, values)), STYLES[index // 10 % 3], color=colour, label=line.label)
        if len(line.runs) > 1:
            axis.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.1, color=colour)
    if name:
        axis.legend(fontsize=8, title=f"mean and range of {len(lines[0].runs)} seeds" if len(lines[0].runs) > 1 else "")


def _plot_time(axis: Any, lines: Sequence[Line]) -> None:
    """A bar a line, by phase; of the transfer alone where the lines differ in it."""
    phases = ("transfer",) if any("transfer" in line.label for line in lines) else PHASES
    left = [0.0] * len(lines)
    for phase in phases:
        widths = [line.milliseconds(phase) for line in lines]
        axis.barh(range(len(lines)), widths, left=left, tick_label=[line.label for line in lines], label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(title="weight transfer, milliseconds a step" if len(phases) == 1 else "milliseconds a step")
    if lines and len(phases) > 1:
        axis.legend(fontsize=8)


def metrics_of(job: Path) -> list[dict[str, float]]:
    """The rows that a job has logged so far."""
    try:
        return [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []
