"""`python -m rlhf.report DIR...`: what runs have done, as one HTML page without links, and its figures as PNG.

One run has its curves with the alarms, where its time went, how new weights arrived, and its samples by reward with
gold beside it. Several, or a sweep, are compared first: leaderboard, curves, bars of time, and the dials that differ.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from rlhf.reports.advice import Dials, advice
from rlhf.reports.comparison import Line, draw_curves, draw_stall, draw_transfer, lines_of, measured
from rlhf.reports.comparison import draw_phases as draw_phase_bars
from rlhf.reports.lane_plot import draw_lanes, lane_names
from rlhf.reports.lanes import SAMPLE, Shares, shares
from rlhf.reports.leaderboard import leaderboard, shown
from rlhf.reports.page import element, folded, html, picture, table, tiles
from rlhf.reports.plots import AGES, HARDWARE, LATENCY, PANELS, Panel, draw_panel, draw_phases, drawing, fired, save
from rlhf.reports.run_folder import RunFolder, is_run, read_run, runs_below
from rlhf.reports.samples import samples_part
from rlhf.reports.summary import ALARM, GPU_MEMORY, PHASES, Rows, hardware, lost_rewards, series, summarise
from rlhf.shell.screen import outlast

SAMPLES = 200  # rows of the samples table at most: the best and the worst, as many of each
WHOLE = 8  # with more runs on one page than these, each has fewer panels
MOST_WORKERS = 15  # that have a number each
NARROW, WIDE = (5.2, 3.3), (10.6, 3.3)  # inches
COMPARED = {
    "eval/gold": "Gold reward (held-out prompts)",
    "eval/reward": "Reward (held-out prompts)",
    "train/reward": "Reward (training prompts)",
    "eval/greedy_accuracy": "Greedy accuracy (held-out)",
    "eval/pair_accuracy": "Accuracy on held-out pairs",
    "train/kl": "KL to the reference, nats a token",
    "train/entropy": "Entropy, nats a token",
    "train/tokens_per_row": "Tokens an answer",
}


def write_report(runs: Sequence[RunFolder], folder: Path) -> Path:
    """Write `report.html` and `report/*.png` into `folder`; returns the page's path."""
    pngs = folder / "report"
    parts = _comparison(runs, pngs) if len(runs) > 1 else []
    for name, run in zip(names(runs), runs, strict=True):
        one = _run(run, pngs / name.replace("/", "-") if len(runs) > 1 else pngs, len(runs))
        parts += [folded(f"{name}: {_told(run)} ({run.status})", *one)] if len(runs) > 1 else one
    title = f"{len(runs)} runs compared" if len(runs) > 1 else f"{_title(runs[0])}: a run"
    page = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    page.write_text(html(title, *parts, _footer(runs)), encoding="utf-8", errors="replace")
    return page


# --- one run ----------------------------------------------------------------------------------------------------------


def _run(run: RunFolder, pngs: Path, of: int) -> list[Element]:
    parts = [_heading(run), element("p", element("code", _told(run)))]
    if run.error:
        parts.append(element("div", f"{run.status}: {run.error}", class_="alarm"))
    if not run.rows:
        return [*parts, element("p", f"There are no numbers in {run.path}/metrics.jsonl: logger=jsonl writes it.")]
    parts += [tiles(_numbers(run)), *_alarms(run.rows)]
    parts += [
        element("h2", "Curves"),
        element("p", "A dashed red line is where an alarm fired first, a red mark each row in which it fired."),
    ]
    panels = [panel for panel in PANELS[: 2 if of > WHOLE else None] if _has(run.rows, panel)]
    parts.append(_panels([_panel(run.rows, panel, pngs) for panel in panels]))
    parts += [element("h2", "Time and weights"), element("p", _time_in_words(run.rows))]
    drawn = [_figure("phases", "Milliseconds a step, by phase", lambda axis: draw_phases(axis, run.rows), pngs)]
    drawn += [_panel(run.rows, panel, pngs) for panel in (LATENCY, *AGES, *HARDWARE) if _has(run.rows, panel)]
    samples = samples_part(run, SAMPLES if of == 1 else SAMPLES // 10)
    return [*parts, _panels(drawn), *_waiting(run, pngs), *samples, *_dials(run)]


def _heading(run: RunFolder) -> Element:
    return element("h1", _title(run), element("span", run.status, class_=f"badge {run.status}"))


def _title(run: RunFolder) -> str:
    algo, seed = run.config.get("algo.name"), run.config.get("seed")
    return f"{algo}, seed {seed}, in {run.path.name}" if algo else run.path.name


def _told(run: RunFolder) -> str:
    return " ".join(run.overrides) or "the default run"


def _numbers(run: RunFolder) -> dict[str, str]:
    """The large numbers of a run's head; a run that has not ended has those up to its last row."""
    summary = summarise(run.rows)
    numbers = {
        label: f"{summary[f'{name}_start']:.3f} → {summary[f'{name}_end']:.3f}"
        for name, label in (
            ("reward", "reward, held-out prompts"),
            ("gold", "gold reward, held-out prompts"),
            ("greedy_accuracy", "greedy accuracy"),
            ("pair_accuracy", "accuracy on held-out pairs"),
        )
        if f"{name}_end" in summary
    }
    for name, label, shape in (
        ("kl_end", "KL at the end, nats a token", "{:.4f}"),
        ("steps", "steps", "{:.0f}"),
        ("step_ms", "a step, median", "{:.0f} ms"),
        ("transfer_ms", "weight transfer, median", "{:.2f} ms"),
        ("transfer_share", "of a step waits for weights", "{:.1%}"),
        ("tokens_per_second", "tokens a second", "{:.0f}"),
        ("tokens_per_second_sampled", "tokens a second, while sampling", "{:.0f}"),
        ("tokens_per_second_learned", "tokens a second, while learning", "{:.0f}"),
    ):
        if name in summary:
            numbers[label] = shape.format(summary[name])
    memory = {name: value for name, value in run.summary.items() if name.startswith(GPU_MEMORY)}
    return numbers | hardware(summary | memory) | lost_rewards(summary)


def _alarms(rows: Rows) -> list[Element]:
    lines = []
    for name in fired(rows):
        steps, _ = series(rows, ALARM + name)
        times = f"in {len(steps)} rows, the last at step {steps[-1]:g}" if len(steps) > 1 else "once"
        lines.append(
            element("div", element("b", f"alarm {name}"), f": first at step {steps[0]:g}, {times}", class_="alarm")
        )
    return lines


def _time_in_words(rows: Rows) -> str:
    summary = summarise(rows)
    whole = sum(summary[f"seconds_{phase}"] for phase in PHASES)
    shares = ", ".join(f"{phase} {summary[f'seconds_{phase}'] / max(whole, 1e-9):.1%}" for phase in PHASES)
    return f"Of the time of all steps: {shares}. Evaluations are part of no step."


def _waiting(run: RunFolder, pngs: Path) -> list[Element]:
    """Who waits for whom, and what to do about it."""
    lanes = run.lanes()
    found = shares(lanes)
    if found is None:
        return []
    ended = run.status != "unfinished"
    parts = [element("h2", "Who waits for whom"), element("p", advice(found, Dials.of(run.config, ended)))]
    parts.append(tiles(_idle(found)))
    if lanes.lines:
        size = WIDE[0], 1.5 + 0.26 * len(lane_names(lanes))
        parts.append(_panels([_figure("lanes", "Who did what when", lambda axis: draw_lanes(axis, lanes), pngs, size)]))
    return parts


def _idle(found: Shares) -> dict[str, str]:
    """Shares of the time after the first step in which somebody waits."""
    idle = {f"{worker} has no request": share for worker, share in found.idle.items()}
    if len(idle) > MOST_WORKERS:
        idle = {f"of {len(idle)} workers' time without a request": sum(idle.values()) / len(idle)}
    waits = {"trainer waits for samples": found.trainer.get(SAMPLE, 0.0), **idle}
    return {name: f"{share:.0%}" for name, share in waits.items()}


def _has(rows: Rows, panel: Panel) -> bool:
    return any(metric in row for metric, _ in panel.lines for row in rows)


def _panel(rows: Rows, panel: Panel, pngs: Path) -> Element:
    size = WIDE if panel is PANELS[0] else NARROW
    return _figure(panel.name, panel.title, lambda axis: draw_panel(axis, rows, panel), pngs, size)


def _figure(
    name: str, title: str, draw: Callable[[Any], None], pngs: Path, size: tuple[float, float] = NARROW
) -> Element:
    with drawing() as subplots:
        figure, axis = subplots(figsize=size)
        draw(axis)
        svg = save(figure, pngs / f"{name}.png")
    return picture(svg, title, wide=size[0] == WIDE[0])


def _panels(figures: Sequence[Element]) -> Element:
    return element("div", *figures, class_="panels")


# --- several runs -----------------------------------------------------------------------------------------------------


def _comparison(runs: Sequence[RunFolder], pngs: Path) -> list[Element]:
    common, every = lines_of(runs)
    lines = measured(every)
    name, places = leaderboard(runs)
    rows = shown(name, places)
    parts = [element("h1", f"{len(runs)} runs compared")]
    if common:
        parts.append(element("p", "All were told ", element("code", " ".join(common))))
    parts += [element("h2", "Leaderboard"), element("p", f"By {name}; mean ± standard deviation over seeds.")]
    parts.append(table(rows, ("tried",), {0: "best"} if places[0].finished else {}))
    ends = [
        {"run": name, "told": _told(run), "status": run.status, "last line": run.error}
        for name, run in zip(names(runs), runs, strict=True)
        if run.status != "finished"
    ]
    if ends:
        parts += [element("h2", "Not finished"), table(ends, ("run", "told", "status", "last line"))]
    if lines:
        parts += [element("h2", "Curves"), element("p", "The mean of the seeds, within their range.")]
        parts.append(_panels(_compared_curves(lines, pngs)))
        parts += [element("h2", "Time and weights"), _panels(_compared_times(lines, pngs))]
    return [*parts, *_differences(runs), element("h2", "Each run")]


def _compared_curves(lines: Sequence[Line], pngs: Path) -> list[Element]:
    def drawn(metric: str, title: str) -> Element:
        name = metric.replace("/", "_")
        return _figure(name, title, lambda axis: draw_curves(axis, lines, metric, title), pngs)

    measured_at_all = [metric for metric in COMPARED if any(line.curve(metric)[0] for line in lines)]
    return [drawn(metric, COMPARED[metric]) for metric in measured_at_all]


def _compared_times(lines: Sequence[Line], pngs: Path) -> list[Element]:
    size = (5.2, max(3.0, 1.4 + 0.28 * len(lines)))
    phases = _figure("phases", "A step by phase", lambda axis: draw_phase_bars(axis, lines), pngs, size)
    transfer = _figure("transfer", "Weight transfer a step", lambda axis: draw_transfer(axis, lines), pngs, size)
    stall = _figure("stall", "Share of a step that waits", lambda axis: draw_stall(axis, lines), pngs, size)
    return [phases, transfer, stall]


def _differences(runs: Sequence[RunFolder]) -> list[Element]:
    """The dials that are not the same in all runs."""
    keys = sorted({key for run in runs for key in run.config})
    rows = []
    for key in keys:
        values = [_value(run.config.get(key)) if key in run.config else "" for run in runs]
        if len(set(values)) > 1:
            rows.append({"dial": key, **dict(zip(names(runs), values, strict=True))})
    if not rows:
        return [element("h2", "Dials that differ"), element("p", "None: all runs have one configuration.")]
    return [element("h2", "Dials that differ"), table(rows, list(rows[0]))]


def _dials(run: RunFolder) -> list[Element]:
    rows = [{"dial": key, "value": _value(value)} for key, value in run.config.items()]
    return [folded("Every dial of this run", table(rows, ("dial", "value")))] if rows else []


def _value(value: Any) -> str:
    return "null" if value is None else str(value)


# --- the command line -------------------------------------------------------------------------------------------------


def _footer(runs: Sequence[RunFolder]) -> Element:
    return element(
        "footer", "Made by python -m rlhf.report from ", element("code", " ".join(str(r.path) for r in runs))
    )


def names(runs: Sequence[RunFolder]) -> list[str]:
    """Each run's folder, in as few words as tell it from the others'."""
    short = [run.path.name for run in runs]
    if len(set(short)) == len(runs):
        return short
    paths = [str(run.path.resolve()) for run in runs]
    shared = os.path.commonpath(paths)
    return [os.path.relpath(path, shared) for path in paths]


def found(folders: Sequence[Path]) -> list[Path]:
    """The runs that are meant: each folder itself, or of a sweep its jobs; ValueError where there is none."""
    runs: list[Path] = []
    for folder in folders:
        below = [folder] if is_run(folder) else runs_below(folder)
        if not below:
            raise ValueError(f"{folder} is neither a run (metrics.jsonl, .hydra/) nor a sweep of runs (0/.hydra/, ...)")
        runs += [each for each in below if each.resolve() not in [run.resolve() for run in runs]]
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """One HTML page about runs: curves, alarms, time, weights, samples; several runs are compared."""
    outlast()
    parser = argparse.ArgumentParser("python -m rlhf.report", description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run's folder, or that of a sweep")
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="where report.html and report/*.png go (default: the one DIR, or here)"
    )
    given = parser.parse_args(arguments)
    try:
        paths = found(given.folders)
    except ValueError as error:
        parser.error(str(error))
    where = given.to or (given.folders[0] if len(given.folders) == 1 else Path())
    runs = [read_run(path) for path in paths]
    for run in runs:
        if not run.rows:
            print(f"warning: {run.path} has no metrics yet, or none that can be read", file=sys.stderr)
    try:
        page = write_report(runs, where)
    except OSError as error:
        parser.error(f"nothing can be written into {where} ({error.strerror}): choose another --to")
    print(f"{len(paths)} run(s): {page} ({page.stat().st_size / 1e6:.2f} MB), {where / 'report'}/*.png")


if __name__ == "__main__":
    main()
