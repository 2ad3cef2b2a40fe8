"""Whether all sides did the same work, and whether ours reaches its bars."""

from __future__ import annotations

from collections.abc import Sequence

from tests.benchmarks.trl_gpu.common import LEARNING, LIGER, OURS, PLAIN, Row
from tests.benchmarks.trl_gpu.shapes import Bars

TRL = "TRL"  # with which the names of its rows begin
TOLERANCE = (
    0.02  # of sampled tokens: a row may end before it has them all, with a probability of 1 / vocabulary a token
)
SAME = ("rows", "prompt_tokens", "prompts")


def named(rows: Sequence[Row], name: str) -> Row:
    """The row of this name; empty if there is none, or it failed."""
    return next((row for row in rows if row["row"] == name and "error" not in row), {})


def work_lines(rows: Sequence[Row]) -> tuple[list[str], bool]:
    """What was compared, and whether every row agrees, step by step, with the first that has most steps."""
    there = [row for row in rows if row.get("work")]
    if len(there) < 2:
        return ["work: fewer than two rows, nothing to compare"], True
    reference = max(there, key=lambda row: len(row["work"]))
    lines = [line for row in there if row is not reference for line in _differences(row, reference)]
    if lines:
        return lines, False
    work = reference["work"]
    tokens = ", ".join(f"{row['row']} {sum(step['tokens'] for step in row['work'])}" for row in there)
    return [
        f"work: the same in {len(there)} rows: {work[0]['rows']} rows a step, prompts of "
        f"{', '.join(str(step['prompt_tokens']) for step in work)} tokens with sha256 "
        f"{', '.join(step['prompts'][:12] for step in work)}",
        f"sampled tokens: {tokens}",
    ], True


def _differences(row: Row, reference: Row) -> list[str]:
    lines = []
    for number, (step, other) in enumerate(zip(row["work"], reference["work"], strict=False), start=1):
        differ = [f"{key} {step[key]} and {other[key]}" for key in SAME if step[key] != other[key]]
        if abs(step["tokens"] - other["tokens"]) > TOLERANCE * other["tokens"]:
            differ.append(f"tokens {step['tokens']} and {other['tokens']}")
        if differ:
            lines.append(f"DIFFERENT WORK, step {number}: {row['row']} and {reference['row']}: {'; '.join(differ)}")
    return lines


def bar_lines(rows: Sequence[Row], bars: Bars) -> list[str]:
    """Each ratio with its bar, and `ok` or `MISSED`; what was not measured is left out."""
    ours, best = named(rows, OURS), best_of_trl(rows)
    liger, plain = named(rows, LIGER), named(rows, PLAIN)
    learning = named(rows, LEARNING)
    faster = 1 / bars.faster if bars.faster else None
    memory = 1.0 if bars.memory else None
    compared = [
        ("step, seconds", ours.get("step"), 1.0, bars.step_s),
        (f"step / {best.get('row')}", ours.get("step"), best.get("step"), faster),
        ("sampling / limit", ours.get("sample"), plain.get("sample"), bars.sampling),
        ("learning / limit", ours.get("learn"), learning.get("learn"), bars.learning),
        ("transfer, seconds", ours.get("transfer"), 1.0, bars.transfer_s),
        (f"trainer's memory / {LIGER}", ours.get("trainer_gib"), liger.get("trainer_gib"), memory),
    ]
    return [_bar(name, value / other, bar) for name, value, other, bar in compared if value and other]


def best_of_trl(rows: Sequence[Row]) -> Row:
    """TRL's fastest row; empty if none was measured."""
    there = [row for row in rows if row["row"].startswith(TRL) and row.get("step")]
    return min(there, key=lambda row: row["step"], default={})


def _bar(name: str, value: float, bar: float | None) -> str:
    if bar is None:
        return f"ours: {name:<52} {value:8.3f}"
    return f"ours: {name:<52} {value:8.3f}   bar {bar:.3f}   {'ok' if value <= bar else 'MISSED'}"
