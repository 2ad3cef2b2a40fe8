"""What our ways between GPUs are held against; those that move the bytes once, over HTTP if that was timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transfer.bench.shapes import Model
from transfer.bench.table import bar
from transfer.bench.ways import NCCL

VIEW, LIVE = ("ipc-arena-view-", "ipc-live-view-"), "ipc-live-copy-"
EARLY = "handle-by-tensor"
TIMES_LIMIT = {"qwen2.5-7b": 1.2, "qwen3-30b-a3b": 1.5}  # whole update
TIMES_FASTER = {"qwen2.5-7b": 4.0, "qwen2.5-0.5b": 10.0}  # than the early engine's way
UPDATE_MS = {"qwen2.5-0.5b": 2.0}  # not for a scaled model
VIEW_MS = 1.0  # control and flip, without the write
PEER_PERCENT = 95.0  # of the raw peer copy's speed
Row = dict[str, Any]


def bars_json(rows: Sequence[Row], model: Model, same_gpu: bool) -> list[dict[str, Any]]:
    """What, the figure, the bar, and whether it is met."""
    timed = {row["way"]: row for row in rows if "n" in row}
    ours = [row for way, row in timed.items() if way.startswith((*VIEW, LIVE))]
    over_http = [row for row in ours if row["way"].endswith("-http")]
    bars = []
    for row in over_http or ours:
        bars += _same_gpu(row, timed, model) if same_gpu else _second_gpu(row, timed)
    return bars


def _same_gpu(row: Row, timed: dict[str, Row], model: Model) -> list[dict[str, Any]]:
    family = model.name.partition(" x ")[0]
    bars = []
    if family in TIMES_LIMIT:
        bars.append(bar(row, "whole update, x memcpy", row["times_memcpy"], "<=", TIMES_LIMIT[family]))
    if model.name in UPDATE_MS:
        bars.append(bar(row, "whole update, ms", row["ms"]["median"], "<=", UPDATE_MS[model.name]))
    if family in TIMES_FASTER and EARLY in timed:
        times = timed[EARLY]["ms"]["median"] / row["ms"]["median"]
        bars.append(bar(row, f"times faster than {EARLY}", times, ">=", TIMES_FASTER[family]))
    if row["way"].startswith(VIEW):
        bars.append(bar(row, "control and flip, ms", row["control_ms"] + row["flip_ms"], "<=", VIEW_MS))
    return bars


def _second_gpu(row: Row, timed: dict[str, Row]) -> list[dict[str, Any]]:
    bars = [bar(row, "% of the raw peer copy's speed", 100 / row["times_memcpy"], ">=", PEER_PERCENT)]
    broadcasts = [timed[way] for way in NCCL if way in timed]
    if broadcasts:
        fastest = min(broadcasts, key=lambda broadcast: broadcast["ms"]["median"])
        times = fastest["ms"]["median"] / row["ms"]["median"]
        bars.append(bar(row, f"times faster than {fastest['way']}", times, ">=", 1.0))
    return bars
