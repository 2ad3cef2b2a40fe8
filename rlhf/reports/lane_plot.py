"""Lanes as a picture: who was busy when, over the last steps of a run."""

from __future__ import annotations

from typing import Any

from rlhf.reports.lanes import SAMPLE, TRAINER, History, Line, in_order, merged
from rlhf.reports.plots import PHASE_COLOURS

STEPS = 10  # that are drawn, the last
LANES = 24  # that are drawn, at most
FINE = 400  # parts of the picture's width, of which each gap between two spans is at least one
WAITS = "waits for samples"
LABELS = {
    SAMPLE: WAITS,
    "reward": "computes rewards",
    "learn": "learns",
    "transfer": "moves weights",
    "verify": "verifies them",
    "evaluate": "evaluates",
    "checkpoint": "saves",
}
OTHERS = {"evaluate": "#9333ea", "checkpoint": "#7c2d12", SAMPLE: "#dbe3ee"}  # beside the colours of phases
BUSY, STEP = "#2563eb", "#475569"


def window(lanes: History) -> tuple[list[Line], float, float]:
    """The lines that are drawn, from when to when."""
    last = lanes.lines[-1].step
    drawn = [line for line in lanes.lines if line.step > last - STEPS]
    before = lanes.lines[-len(drawn) - 1 : -len(drawn)]
    if before:
        return drawn, before[0].until, lanes.until
    first = drawn[0].spans  # what came before the trainer's first phase is not about steps
    spans = first.get(TRAINER) or [span for each in first.values() for span in each]
    return drawn, min((began for _, began, _ in spans), default=0.0), lanes.until


def lane_names(lanes: History) -> list[str]:
    """Those that are drawn, the uppermost first."""
    lines, _, _ = window(lanes)
    return in_order(dict.fromkeys(lane for line in lines for lane in line.spans))[:LANES]


def draw_lanes(axis: Any, lanes: History) -> None:
    """A row a lane; what is white is nobody's: the trainer is in no phase, a worker has no request."""
    lines, since, until = window(lanes)
    names, labelled = lane_names(lanes), set[str]()
    for row, lane in enumerate(names):
        spans = [span for line in lanes.lines for span in line.spans.get(lane, ()) if span[2] > since]
        bars: dict[str, list[tuple[float, float]]] = {}
        for what, began, ended in merged(spans, (until - since) / FINE):
            bars.setdefault(what, []).append((max(began, since), min(ended, until) - max(began, since)))
        for what, places in bars.items():
            label, colour = (LABELS.get(what, what), _colour(what)) if lane == TRAINER else ("samples", BUSY)
            shown = f"_{label}" if label in labelled else label  # once in the legend
            labelled.add(label)
            axis.broken_barh(places, (row - 0.38, 0.76), facecolors=colour, label=shown, linewidth=0)
    ends = {line.step: line.until for line in lines}
    axis.vlines(list(ends.values()), -0.5, len(names) - 0.5, colors=STEP, linestyles=":", linewidth=0.8)
    axis.set(
        xlim=(since, max(until, since + 1e-3)), ylim=(len(names) - 0.5, -0.5), xlabel="seconds since the run's begin"
    )
    axis.set_yticks(range(len(names)), [name if len(name) <= 24 else f"{name[:23]}…" for name in names])
    axis.set_title(f"Steps {lines[0].step} to {lines[-1].step}; a dotted line is the end of one")
    axis.grid(visible=False)
    axis.figure.legend(loc="outside lower center", ncols=8, columnspacing=1.2, handlelength=1.2)


def _colour(what: str) -> str:
    return OTHERS.get(what) or PHASE_COLOURS.get(what, "#0891b2")
