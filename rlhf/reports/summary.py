"""The end of a run in a few numbers, from the recorded rows: `summary.json`, and the table on the screen."""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from rlhf.config import Objective
from rlhf.shell.screen import plain_console

Rows = Sequence[Mapping[str, float]]
ALARM = "alarm/"
PHASES = ("sample", "reward", "learn", "transfer", "verify")
LOST = {  # samples without a reward, by what befell them
    "timed_out": "timed out",
    "raised": "raised",
    "refused": "refused",
    "not_finite": "NaN or infinite",
    "not_a_number": "no number",
}
IDLE, GPU_MEMORY = "gpu_idle/", "gpu_memory_mib/"  # groups of numbers, a phase or a process each
WHILE = {
    "sample": "sampling",
    "reward": "scoring",
    "learn": "learning",
    "transfer": "moving weights",
    "verify": "verifying",
    "evaluate": "evaluating",
}
MEDIANS = {  # numbers of the summary, and the metrics whose medians they are
    "mfu": "train/mfu",
    "tokens_per_second_sampled": "tokens_per_second/sampled",
    "tokens_per_second_learned": "tokens_per_second/learned",
}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number that a float can be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def mean_of(values: Sequence[float]) -> float:
    """The mean, also of numbers whose sum no float can be; NaN where infinities of both signs are among them."""
    try:
        return statistics.fmean(values)
    except (OverflowError, ValueError):
        finite = all(map(math.isfinite, values))
        return statistics.mean(values) if finite else sum(value / len(values) for value in values)


def series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it was measured."""
    there = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in there], [value for _, value in there]


def summarise(rows: Rows) -> dict[str, float]:
    """The few numbers that tell how a run went; seconds are sums over its steps, evaluations left out.

    `alarm/<name>` is the step at which that alarm fired first.
    """
    summary: dict[str, float] = {}
    passed = [f"pass_at_{k}" for k in _ks(name.removeprefix("eval/") for row in rows for name in row)]
    for name in ("reward", "gold", "greedy_accuracy", *passed, "pair_accuracy"):
        _, values = series(rows, f"eval/{name}")
        if values:
            summary |= {f"{name}_start": values[0], f"{name}_end": values[-1]}
    for phase in PHASES:
        summary[f"seconds_{phase}"] = sum(series(rows, f"seconds/{phase}")[1])
    steps = series(rows, "seconds/step")[1]
    if steps:
        summary["steps"] = len(steps)
        summary["step_ms"] = 1e3 * statistics.median(steps)
        summary["transfer_ms"] = 1e3 * statistics.median(series(rows, "seconds/transfer")[1] or [0.0])
        summary["transfer_share"] = summary["seconds_transfer"] / (sum(steps) or 1.0)
        if pace := series(rows, "tokens_per_second")[1]:
            summary["tokens_per_second"] = statistics.median(pace)
    summary |= _of_hardware(rows)
    for name in ("kl", "mismatch"):
        _, values = series(rows, f"train/{name}")
        if values:
            summary[f"{name}_end"] = values[-1]
    summary |= _lost(rows)
    for name in sorted({name for row in rows for name in row if name.startswith(ALARM)}):
        summary[name] = series(rows, name)[0][0]
    return summary


def _lost(rows: Rows) -> dict[str, float]:
    """Samples of all steps that had no reward, by what befell them."""
    there = {name: series(rows, f"train/reward_{name}")[1] for name in LOST}
    return {f"rewards_{name}": sum(values) for name, values in there.items() if values}


def _of_hardware(rows: Rows) -> dict[str, float]:
    """Medians of what was computed a second, and the means of how idle the GPU was, by phase."""
    found: dict[str, float] = {}
    for name, metric in MEDIANS.items():
        if values := series(rows, metric)[1]:
            found[name] = statistics.median(values)
    for name in sorted({name for row in rows for name in row if name.startswith(IDLE)}):
        found[name] = mean_of(series(rows, name)[1])
    return found


def hardware(summary: Mapping[str, Any]) -> dict[str, str]:
    """What a run has made of its GPU, in words: MFU, memory of each process, and how idle it was by phase."""
    told: dict[str, str] = {}
    if "mfu" in summary:
        told["MFU of learning"] = f"{summary['mfu']:.1%}"
    for name, value in summary.items():
        if not is_number(value):
            continue
        if name.startswith(GPU_MEMORY):
            told[f"GPU memory, {name.removeprefix(GPU_MEMORY)}"] = f"{value / 1024:.1f} GiB"
        elif name.startswith(IDLE):
            phase = name.removeprefix(IDLE)
            told[f"GPU idle while {WHILE.get(phase, phase)}"] = f"{value:.0%}"
    return told


def lost_rewards(summary: Mapping[str, Any]) -> dict[str, str]:
    """How many samples of a run had no reward, in words, by what befell them."""
    there = {label: summary.get(f"rewards_{name}") for name, label in LOST.items()}
    return {f"rewards lost: {label}": f"{value:g}" for label, value in there.items() if is_number(value) and value}


def _ks(names: Iterable[str]) -> list[int]:
    """Each k of names like `pass_at_4_end`, in order."""
    found = [re.fullmatch(r"pass_at_(\d+)(_end)?", name) for name in names]
    return sorted({int(match[1]) for match in found if match})


def write_summary(folder: Path, status: str, overrides: Sequence[str], numbers: Mapping[str, Any]) -> None:
    """Write `summary.json`; `status` is finished, failed or interrupted."""
    text = json.dumps({"status": status, "overrides": list(overrides), **numbers}, indent=1)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")


def read_summary(folder: Path) -> dict[str, Any]:
    """The folder's summary, or an empty dict where there is none to read."""
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def objective_of(summary: Mapping[str, Any], objective: Objective | None) -> float | None:
    """What a run is judged by; without a choice, the first of gold, reward and pair accuracy that it has measured."""
    if objective is None:
        there = (summary.get(name.key) for name in (Objective.gold, Objective.reward, Objective.pair_accuracy))
        return next((value for value in there if value is not None), None)
    if objective is Objective.pass_at_k:
        ks = _ks(summary)
        return summary[f"pass_at_{ks[-1]}_end"] if ks else None
    return summary.get(objective.key)


def print_table(summary: Mapping[str, float], folder: Path, title: str, advice: str | None = None) -> None:
    """The table a run ends with, what to change, and where its files are."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column("")
    for column in ("start", "end"):
        table.add_column(column, justify="right")
    for name, label in (
        ("reward", "reward (held-out)" if "pair_accuracy_end" in summary else "reward (trained on)"),
        ("gold", "gold reward (held-out)"),
        ("greedy_accuracy", "greedy accuracy"),
        *((f"pass_at_{k}", f"pass@{k}") for k in _ks(summary)),
        ("pair_accuracy", "accuracy on held-out pairs"),
    ):
        if f"{name}_end" in summary:
            table.add_row(label, f"{summary[f'{name}_start']:.3f}", f"{summary[f'{name}_end']:.3f}")
    if "kl_end" in summary:
        table.add_row("KL to the reference, nats/token", "0", f"{summary['kl_end']:.4f}")
    table.add_section()
    for name in [name for name in summary if name.startswith(ALARM)]:
        table.add_row(f"alarm {name.removeprefix(ALARM)}, first at step", "", f"{summary[name]:g}")
    for label, value in lost_rewards(summary).items():
        table.add_row(label, "", value)
    _add_speed(table, summary)
    console = plain_console()
    console.print(table)
    console.print(
        f"weight transfer: {summary['transfer_ms']:.2f} ms a step, {summary['transfer_share']:.1%} "
        f"of {summary['step_ms']:.0f} ms",
        highlight=False,
    )
    if advice is not None:
        console.print(advice, soft_wrap=True, highlight=False)
    console.print(f"written: {folder}/", soft_wrap=True, highlight=False)
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("."):
            console.print(f"  {path.name}{'/' if path.is_dir() else ''}", highlight=False)
    console.print(f"next: python -m rlhf.report {shlex.quote(str(folder))}", soft_wrap=True, highlight=False)
    console.print("      look at report.html; then change a dial: algo=rloo task=reverse", highlight=False)


def _add_speed(table: Any, summary: Mapping[str, float]) -> None:
    """Rows about tokens, the GPU, and where a step's time goes."""
    table.add_row("tokens/s", "", f"{summary['tokens_per_second']:.0f}")
    for name, label in (("sampled", "  sampled, while sampling"), ("learned", "  learned, while learning")):
        if f"tokens_per_second_{name}" in summary:
            table.add_row(label, "", f"{summary[f'tokens_per_second_{name}']:.0f}")
    for label, value in hardware(summary).items():
        table.add_row(label, "", value)
    steps, seconds = summary["steps"], sum(summary[f"seconds_{phase}"] for phase in PHASES)
    table.add_row("a step, mean of all", "", f"{1e3 * seconds / steps:.1f} ms")
    for phase in PHASES:
        spent = summary[f"seconds_{phase}"]
        table.add_row(f"  {phase} ({spent / max(1e-9, seconds):.1%})", "", f"{1e3 * spent / steps:.1f} ms")
