"""The measured rows as a table, as JSON, and against the bars; milliseconds, and GB = 1e9 bytes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from transfer.bench.measure import Row
from transfer.bench.shapes import Model
from transfer.bench.ways import CPU, CUDA, FLAT, LIMITS, PEERS

WRITE_PERCENT = 90.0  # of memcpy's speed
FLIP_MS = 1.0
SMALL_UPDATE_MS = 5.0
SMALL_BYTES = 2 * 10**6  # what is meant by the model of 1 MB
NOISY = 1.1  # of memcpy's median to its fastest
WARM_BYTES = 100 * 10**6  # of smaller models memcpy's time depends on what is in the cache
CONTROL_BYTES = 1024  # of one worker's update
HEADER = (
    *("way", "n", "MB", "median", "min", "max", "GB/s", "x memcpy"),
    *("write", "flip", "control", "bodies", "wire", "bytes"),
)
EXTRA = "extra MB"
LEGEND = """\
Milliseconds of a whole update, from the trainer's weights to the receiver's module; GB = 1e9 bytes. Rounds run every
way once, in any order, beside a memcpy of the same bytes; "x memcpy" compares the medians. n: how often it was timed,
less where that takes seconds; small models warm.

write    until the bytes wait where the receiver finds them
flip     the time in which the receiver cannot serve, taken there
control  the messages, without the work that they are about
bodies   bytes of one update's messages, both directions
wire     the same with HTTP's headers, counted by a TCP relay in an update that is not timed
bytes    whether the receiver's digest was the trainer's, asked once after the weights had changed
"""

CUDA_LEGEND = """\
Milliseconds of a whole update, from the trainer's weights to the receiver's module, both in GPU memory; GB = 1e9 bytes.
Each way is checked first, then timed n times; "x memcpy" compares the medians with the limit's, which is measured anew
before each receiving process.

write    the trainer is blocked: packing, until the bytes wait where the receiver finds them
flip     the time in which the receiver cannot serve, taken there
control  the messages, without the work that they are about
bodies   bytes of one update's messages, both directions
wire     the same with HTTP's headers, counted by a TCP relay in an update that is not timed
bytes    whether the receiver's digest was the trainer's, asked once after the weights had changed
extra    GPU memory of both processes after an update, beyond their two copies of the weights
"""


def row_json(row: Row, model: Model, device: str = CPU) -> dict[str, Any]:
    """One way's figures; None for what is not known."""
    about = LIMITS[device].get(row.way) or PEERS[device].get(row.way)
    told: dict[str, Any] = {"way": row.way, "about": about, "bytes": model.nbytes}
    if row.extra_bytes is not None:
        told["extra_gpu_bytes"] = row.extra_bytes
    if row.failed or not row.samples:
        return told | {"failed": row.failed or "not run"}
    median = statistics.median(row.samples)
    limit = statistics.median(row.limits)
    return told | {
        "n": len(row.samples),
        "ms": {"median": 1e3 * median, "min": 1e3 * min(row.samples), "max": 1e3 * max(row.samples)},
        "gb_per_s": model.nbytes / median / 1e9,
        "memcpy_ms": 1e3 * limit,
        "memcpy_ms_min": 1e3 * min(row.limits),
        "times_memcpy": median / limit,
        "write_ms": _median_ms(parts.write for parts in row.parts),
        "write_ms_min": min((1e3 * parts.write for parts in row.parts if parts.write is not None), default=None),
        "flip_ms": _median_ms(parts.flip for parts in row.parts),
        "control_ms": _median_ms(parts.control for parts in row.parts),
        "control_bytes_bodies": row.control.bodies,
        "control_bytes_wire": row.control.wire,
        "verified": row.verified,
        "plan": row.plan,
    }


def _median_ms(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return 1e3 * statistics.median(known) if known else None


def bars_json(rows: Sequence[dict[str, Any]], model: Model) -> list[dict[str, Any]]:
    """What arena and view are held against: what, the figure, the bar, and whether it is met."""
    timed = [row for row in rows if "n" in row]
    ours = [row for row in timed if row["way"].startswith("ipc-arena-view-") and "-full-" not in row["way"]]
    over_http = [row for row in ours if row["way"].endswith("-http")]
    return [bar for row in over_http or ours for bar in _bars_of(row, model)]


def _bars_of(row: dict[str, Any], model: Model) -> list[dict[str, Any]]:
    share = 100 * row["memcpy_ms"] / row["write_ms"]
    fastest = 100 * row["memcpy_ms_min"] / row["write_ms_min"]
    bars = [
        bar(row, f"write, % of memcpy's speed (the fastest of each: {fastest:.0f})", share, ">=", WRITE_PERCENT),
        bar(row, "flip, ms", row["flip_ms"], "<=", FLIP_MS),
    ]
    if model.nbytes <= SMALL_BYTES and row["way"].endswith("-http"):
        bars.append(bar(row, "whole update, ms", row["ms"]["median"], "<=", SMALL_UPDATE_MS))
    for kind, what in (("bodies", "the bodies alone"), ("wire", "on the wire, headers included")):
        if row[f"control_bytes_{kind}"] is not None:
            bars.append(bar(row, f"control, bytes {what}", row[f"control_bytes_{kind}"], "<", CONTROL_BYTES))
    return bars


def bar(row: dict[str, Any], what: str, figure: float, relation: str, limit: float) -> dict[str, Any]:
    """One figure of a way, and what it must be."""
    met = {">=": figure >= limit, "<=": figure <= limit, "<": figure < limit}[relation]
    return {"way": row["way"], "what": what, "figure": figure, "relation": relation, "bar": limit, "met": met}


# --- text -------------------------------------------------------------------------------------------------------------


def table_text(model: Model, rows: Sequence[dict[str, Any]], bars: Sequence[dict[str, Any]]) -> str:
    """The table of one model with its bars below."""
    dtypes = ", ".join(sorted({dtype for dtype, _ in model.tensors.values()}))
    lines = [f"{model.name}: {model.nbytes:,} bytes in {len(model.tensors)} tensors, {dtypes}", ""]
    cells = [list(HEADER)] + [_cells(row) for row in rows if "n" in row]
    if any("extra_gpu_bytes" in row for row in rows):
        extras = [row.get("extra_gpu_bytes") for row in rows if "n" in row]
        texts = [EXTRA, *("-" if extra is None else f"{extra / 1e6:.0f}" for extra in extras)]
        cells = [[*line, text] for line, text in zip(cells, texts, strict=True)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for first, *others in cells:
        padded = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    lines += [f"{row['way'].ljust(widths[0])}  no figures: {row['failed']}" for row in rows if "failed" in row]
    lines += [f"plan  {row['way']}: {row['plan']}" for row in rows if row.get("plan") and "extra_gpu_bytes" in row]
    lines += ["", *(_bar_text(bar) for bar in bars)] if bars else []
    if model.nbytes > WARM_BYTES:
        lines += [_noise(row) for row in rows if row["way"] == FLAT and "n" in row]
    return "\n".join(lines)


def legend(device: str = CPU) -> str:
    """What the columns and the ways are."""
    channels = {CPU: "ipc-..., disk-...", CUDA: "ipc-..."}[device]
    ways = {**LIMITS[device], channels: "ours: backend, staging and take, verify, sender", **PEERS[device]}
    return "\n".join(
        [{CPU: LEGEND, CUDA: CUDA_LEGEND}[device], *(f"{name:18}  {about}" for name, about in ways.items())]
    )


def _cells(row: dict[str, Any]) -> list[str]:
    ms = row["ms"]
    return [
        row["way"],
        str(row["n"]),
        f"{row['bytes'] / 1e6:.1f}",
        *(_number(ms[which]) for which in ("median", "min", "max")),
        f"{row['gb_per_s']:.2f}",
        f"{row['times_memcpy']:.2f}",
        *(_number(row[part]) for part in ("write_ms", "flip_ms", "control_ms")),
        *("-" if row[key] is None else str(row[key]) for key in ("control_bytes_bodies", "control_bytes_wire")),
        "-" if row["way"] in LIMITS[CPU] else "right" if row["verified"] else "not checked",
    ]


def _number(milliseconds: float | None) -> str:
    """Three figures or so."""
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.{3 if milliseconds < 1 else 2 if milliseconds < 100 else 0}f}"


def _noise(row: dict[str, Any]) -> str:
    """How far the limit itself can be trusted."""
    ms = row["ms"]
    spread = ms["median"] / ms["min"]
    verdict = "other work disturbs this run: do not rely on it" if spread > NOISY else "steady"
    return f"{'noise':6}  {spread:8.2f}  memcpy's median / its fastest in {row['n']}: {verdict}"


def _bar_text(bar: dict[str, Any]) -> str:
    verdict = "OK" if bar["met"] else "missed"
    return f"{verdict:6}  {bar['figure']:8.2f}  (bar: {bar['relation']} {bar['bar']:g})  {bar['what']}: {bar['way']}"
