"""What a run has measured, drawn: a panel a question, with the alarms where they fired; and `curves.png`."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.rollout import MOST_LAG
from rlhf.reports.summary import ALARM, PHASES, Rows, mean_of, series

LARGEST = 1e100  # that is drawn
POINTS = 500  # a longer line is drawn as means of neighbours
COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#0891b2", "#ca8a04", "#db2777", "#65a30d", "#475569", "#7c2d12")
PHASE_COLOURS = dict(zip(PHASES, ("#2563eb", "#f59e0b", "#059669", "#dc2626", "#94a3b8"), strict=True))
RED = "#dc2626"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#94a3b8",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelcolor": "#475569",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "font.size": 8.5,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",  # text stays text: a tenth of the size
    "svg.hashsalt": "rlhf",  # the same figure is the same file
    "text.color": "#0f172a",
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
}


@dataclass(frozen=True, slots=True)
class Panel:
    """Metrics that answer one question, and the alarms that watch them."""

    name: str
    title: str
    lines: Sequence[tuple[str, str]]  # metric, label
    alarms: Sequence[str] | None = None  # None: all of them
    scale: float = 1.0
    least: float | None = None  # the axis goes from 0 to this at least


PANELS = (
    Panel(
        "reward",
        "Reward",
        (
            ("train/reward", "reward (training prompts)"),
            ("eval/reward", "reward (held-out)"),
            ("eval/gold", "gold reward (held-out)"),
            ("eval/greedy_accuracy", "greedy accuracy (held-out)"),
            ("eval/pair_accuracy", "accuracy on held-out pairs"),
        ),
    ),
    Panel("kl", "KL to the reference, nats a token", (("train/kl", "KL"),), ("kl",)),
    Panel("entropy", "Entropy, nats a token", (("train/entropy", "entropy"),), ("entropy",)),
    Panel(
        "gradient",
        "Norm of the gradient",
        (("train/grad_norm", "policy"), ("train/critic_grad_norm", "critic")),
        ("gradient", "nan"),
    ),
    Panel("length", "Tokens an answer", (("train/tokens_per_row", "tokens"),), ("length", "truncated")),
    Panel(
        "shares",
        "Shares of prompts, answers, tokens",
        (
            ("train/zero_std", "prompts without a signal"),
            ("train/truncated", "answers that are cut"),
            ("train/clip_fraction", "tokens that are clipped"),
        ),
        ("no_signal", "truncated"),
    ),
    Panel(
        "pairs",
        "Training pairs",
        (("train/accuracy", "in the right order"), ("train/margin", "margin")),
        (),
    ),
    Panel("mismatch", "Log-probs, worker against trainer", (("train/mismatch", "mean difference"),), ("mismatch",)),
    Panel("ess", "Effective share of the samples", (("train/ess", "of the tokens"),), ("ess",), least=1.0),
)
LATENCY = Panel(
    "transfer",
    "Weight transfer, milliseconds a step",
    (("seconds/transfer", "what a step waits"), ("transfer/write_seconds", "of it writing the weights")),
    (),
    1e3,
    1.0,
)
AGES = (
    Panel(
        "lag",
        "Lag of sampled tokens, versions",
        (("rollout/lag", "mean"), ("rollout/lag_max", "largest")),
        ("lag",),
        least=1.0,
    ),
    Panel(
        "ages",
        "Share of the tokens that are so many versions old",
        tuple((f"rollout/lag_{age}", str(age)) for age in range(MOST_LAG + 1)),
        (),
        least=1.0,
    ),
    Panel("queue", "Whole groups that wait for the trainer", (("rollout/queue", "groups"),), (), least=1.0),
)
HARDWARE = (
    Panel(
        "pace",
        "Tokens a second",
        (("tokens_per_second/sampled", "while sampling"), ("tokens_per_second/learned", "while learning")),
        (),
        least=1.0,
    ),
    Panel("mfu", "MFU of learning", (("train/mfu", "MFU"),), (), least=0.0),
    Panel(
        "idle",
        "Share of a phase without a kernel on the GPU",
        tuple((f"gpu_idle/{phase}", phase) for phase in PHASES),
        (),
        least=1.0,
    ),
)


def figure_class() -> Any:
    """matplotlib's, which needs no screen; the first call takes a third of a second, more where fonts are new.

    Not pyplot, whose backend and open figures are a program's own.
    """
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure

    assert backend_agg  # by which figures are saved
    return Figure


@contextmanager
def drawing() -> Iterator[Callable[..., Any]]:
    """Figures in this project's style: (rows, columns, figsize=..., of axes ...) -> figure and axes, as of pyplot."""
    from cycler import cycler
    from matplotlib import rc_context

    def subplots(*grid: int, figsize: tuple[float, float], **of_axes: Any) -> tuple[Any, Any]:
        figure = figure_class()(figsize=figsize, layout="constrained")
        return figure, figure.subplots(*grid, **of_axes)

    with rc_context(STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}):
        yield subplots


def plot_curves(rows: Rows, path: Path, title: str) -> None:
    """Reward and gold, KL, and the milliseconds of each phase, over steps."""
    with drawing() as subplots:
        figure, (rewards, kl, phases) = subplots(1, 3, figsize=(14, 4))
        figure.suptitle(title)
        draw_panel(rewards, rows, PANELS[0])
        draw_panel(kl, rows, PANELS[1])
        draw_phases(phases, rows)
        figure.savefig(path, dpi=110)


def draw_panel(axis: Any, rows: Rows, panel: Panel) -> None:
    """A line a metric that was measured, and the panel's alarms."""
    for metric, label in panel.lines:
        steps, values = thinned(*series(rows, metric))
        if steps:
            few = metric.startswith("eval") or len(steps) < 20
            axis.plot(steps, [panel.scale * v for v in values], label=label, marker="o" if few else None, markersize=3)
    if panel.least is not None:
        top = max(panel.least, axis.get_ylim()[1])
        axis.set_ylim(-0.03 * top, top)
    _alarms(axis, rows, panel.alarms)
    finish(axis, panel.title)


def draw_phases(axis: Any, rows: Rows) -> None:
    """What each phase takes of a step, stacked."""
    timed = [row for row in rows if "seconds/step" in row]
    if timed:
        steps = [row["step"] for row in timed]
        stack = [thinned(steps, [1e3 * row.get(f"seconds/{phase}", 0.0) for row in timed]) for phase in PHASES]
        axis.stackplot(
            stack[0][0], [values for _, values in stack], labels=PHASES, colors=PHASE_COLOURS.values(), linewidth=0
        )
    finish(axis, "Milliseconds a step, by phase")


def finish(axis: Any, title: str) -> None:
    """What all axes have."""
    axis.set(title=title, xlabel="step")
    entries = len(axis.get_legend_handles_labels()[0])
    if entries > 3:  # they would hide the lines
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, columnspacing=1.2, handlelength=1.5)
    elif entries > 1:
        axis.legend()


def _alarms(axis: Any, rows: Rows, names: Sequence[str] | None) -> None:
    """A dashed line where an alarm fired first, and a mark on the axis at each row in which it fired."""
    for name in fired(rows):
        if names is None or name in names:
            steps, _ = series(rows, ALARM + name)
            axis.axvline(steps[0], color=RED, linestyle="--", linewidth=1, label=f"alarm {name}, step {steps[0]:g}")
            marks = {"color": RED, "marker": "|", "linestyle": "", "markersize": 7, "clip_on": False}
            axis.plot(steps, [0.0] * len(steps), transform=axis.get_xaxis_transform(), zorder=5, **marks)


def fired(rows: Rows) -> list[str]:
    """The names of the alarms that have fired, the earliest first."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(ALARM))
    return [name.removeprefix(ALARM) for name in names]


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `POINTS` of both, means of neighbours."""
    width = -(-len(steps) // POINTS) or 1
    starts = range(0, len(steps), width)
    return tuple([mean_of(them[start : start + width]) for start in starts] for them in (steps, drawable(values)))  # type: ignore[return-value]


def drawable(values: Sequence[float]) -> list[float]:
    """The values with gaps (NaN) where one is so large that an axis around it has no ends."""
    return [value if abs(value) <= LARGEST else math.nan for value in values]


def save(figure: Any, png: Path) -> str:
    """Write the figure to `png`; returns it as SVG."""
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=140)
    figure.set_layout_engine("none")  # all has its place now
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()
