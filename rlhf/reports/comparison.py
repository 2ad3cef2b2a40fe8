"""Runs beside each other: a line for each thing that was tried, over all of its seeds, and where a step's time went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.reports.plots import COLOURS, LARGEST, PHASE_COLOURS, drawable, drawing, finish
from rlhf.reports.run_folder import RunFolder
from rlhf.reports.summary import PHASES, mean_of, series

MEASURES = {  # what the lines are compared by: the first that all of them have
    "eval/gold": "Gold reward (held-out prompts)",
    "eval/reward": "Reward (held-out prompts)",
    "train/reward": "Reward (training prompts)",
    "eval/pair_accuracy": "Accuracy on held-out pairs",
}
STYLES = ("-", "--", ":")  # for more lines than there are colours


@dataclass(slots=True)
class Line:
    """The runs that differ in nothing but their seed."""

    label: str
    runs: list[RunFolder]

    def curve(self, name: str) -> tuple[list[float], list[list[float]]]:
        """The steps at which every run that has begun has measured `name`, and all their values at each."""
        runs = [dict(zip(*series(run.rows, name), strict=True)) for run in self.runs if run.rows]
        steps = sorted(set.intersection(*map(set, runs))) if runs else []
        return steps, [[values[step] for values in runs] for step in steps]

    def milliseconds(self, phase: str) -> float:
        """The median of what the phase takes of a step."""
        seconds = self._seconds(phase)
        return _length(1e3 * statistics.median(seconds)) if seconds else 0.0

    @property
    def stall(self) -> float:
        """The share of all its steps' time in which nothing else is done than moving weights, in percent."""
        steps = sum(self._seconds("step"))
        return _length(100 * sum(self._seconds("transfer")) / steps) if steps else 0.0

    def _seconds(self, phase: str) -> list[float]:
        return [second for run in self.runs for second in series(run.rows, f"seconds/{phase}")[1]]


def _length(value: float) -> float:
    """Of a bar, which must have an end."""
    return value if abs(value) <= LARGEST else 0.0


def lines_of(runs: Sequence[RunFolder]) -> tuple[list[str], list[Line]]:
    """What all runs have been told, and the runs as lines, each named by what only it was told."""
    told = [set(run.overrides) for run in runs]
    common = [word for word in (runs[0].overrides if runs else []) if all(word in words for words in told)]
    lines: dict[str, Line] = {}
    for run in runs:
        own = [word for word in run.overrides if word not in common and not word.startswith("seed=")]
        label = " ".join(own) or ("seeds" if len(runs) > 1 else "one run")
        lines.setdefault(label, Line(label, [])).runs.append(run)
    return common, list(lines.values())


def measured(lines: Sequence[Line]) -> list[Line]:
    """Those of which there is something to draw."""
    return [line for line in lines if any(run.rows for run in line.runs)]


def plot_comparison(runs: Sequence[RunFolder], path: Path) -> None:
    """Reward over steps, the mean of each line's seeds within their range, beside three bars a line of time."""
    common, every = lines_of(runs)
    lines = measured(every)
    name = next((name for name in MEASURES if lines and all(line.curve(name)[0] for line in lines)), "")
    with drawing() as subplots:
        size = (15, max(4.2, 1.6 + 0.3 * len(lines)))
        figure, (curves, *bars) = subplots(1, 4, figsize=size, width_ratios=(3, 2, 1, 1))
        figure.suptitle(" ".join(common), fontsize=9)
        draw_curves(curves, lines, name, MEASURES.get(name, ""))
        draw_phases(bars[0], lines)
        draw_transfer(bars[1], lines)
        draw_stall(bars[2], lines)
        for axis in bars[1:]:
            axis.set_yticklabels([])
        figure.savefig(path, dpi=100)


def draw_curves(axis: Any, lines: Sequence[Line], name: str, title: str) -> None:
    """One metric over steps, a line for each thing that was tried."""
    for index, line in enumerate(lines):
        steps, values = line.curve(name)
        if not steps:
            continue
        colour = COLOURS[index % len(COLOURS)]
        style = STYLES[index // len(COLOURS) % len(STYLES)]
        axis.plot(steps, drawable(list(map(mean_of, values))), style, color=colour, label=line.label)
        if len(line.runs) > 1:
            axis.fill_between(
                steps,
                drawable(list(map(min, values))),
                drawable(list(map(max, values))),
                alpha=0.12,
                color=colour,
                lw=0,
            )
    finish(axis, title)
    seeds = max((len(line.runs) for line in lines), default=1)
    if axis.get_legend() is not None and seeds > 1:
        axis.get_legend().set_title(f"mean and range of {seeds} seeds")


def draw_phases(axis: Any, lines: Sequence[Line]) -> None:
    """A bar a line: what the phases take of a step."""
    left = [0.0] * len(lines)
    for phase in PHASES:
        widths = [line.milliseconds(phase) for line in lines]
        _bars(axis, lines, widths, left=left, label=phase, color=PHASE_COLOURS[phase])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    _finish_bars(axis, "A step by phase, ms")
    if lines:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(PHASES), handlelength=1, columnspacing=1)


def draw_transfer(axis: Any, lines: Sequence[Line]) -> None:
    """A bar a line: the milliseconds that a step waits for new weights to arrive."""
    _labelled(axis, lines, [line.milliseconds("transfer") for line in lines], "Transfer, ms a step")


def draw_stall(axis: Any, lines: Sequence[Line]) -> None:
    """A bar a line: the share of all time in which nothing is done but moving weights."""
    _labelled(axis, lines, [line.stall for line in lines], "Stall, % of a step")


def _labelled(axis: Any, lines: Sequence[Line], widths: list[float], title: str) -> None:
    bars = _bars(axis, lines, widths, label=title, color=COLOURS[0])
    axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axis.margins(x=0.25)
    _finish_bars(axis, title)


def _bars(axis: Any, lines: Sequence[Line], widths: list[float], **options: Any) -> Any:
    return axis.barh(range(len(lines)), widths, height=0.6, tick_label=[line.label for line in lines], **options)


def _finish_bars(axis: Any, title: str) -> None:
    low, high = axis.get_ylim()
    axis.set_ylim(max(high, 2.5), low)  # the first on top; few bars stay slim
    axis.grid(visible=False, axis="y")
    axis.set_title(title)
