"""What came out of pushes from several ranks, as JSON and as a table; milliseconds, and GB = 1e9 bytes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from transfer.bench.rank import FAR
from transfer.bench.ranks import Measured
from transfer.config import Verify

MEMCPY = 1.15  # bar: read to memcpy, CPU
PEER = 1.15  # bar: read of all to the copy of the other ranks' rows, GPU
GATHER = {"cpu": 5.0, "cuda": 10.0}  # bar: the usual way to a push without digest, or on the CPU to the read


def as_json(found: Measured) -> dict[str, Any]:
    """Medians in ms, and the bars."""
    rows = []
    for row in found.rows:
        told: dict[str, Any] = {"way": f"push to {row.case.name}"}
        if row.failed or not row.push:
            rows.append(told | {"failed": row.failed or "not run"})
            continue
        middle = {f"{what}_ms": 1e3 * statistics.median(getattr(row, what)) for what in ("push", "write", "read")}
        rows.append(told | middle | {"n": len(row.push), "verified": row.right, "plan": row.plan})
    gather = 1e3 * statistics.median(found.gather)
    limits = {name: 1e3 * seconds for name, seconds in found.limits.items()}
    if found.setting.device == "cpu" and found.rows[0].memcpy:
        limits["memcpy of all"] = 1e3 * statistics.median(s for row in found.rows for s in row.memcpy)
    return {
        "name": found.setting.model.name,
        "bytes": found.setting.model.nbytes,
        "ranks": found.setting.ranks,
        "device": found.setting.device,
        "rows": rows,
        "gather_ms": gather,
        "limits_ms": limits,
        "bars": _bars(found, gather),
    }


def _bars(found: Measured, gather: float) -> list[dict[str, Any]]:
    fast = next((row for row in found.rows if row.case.verify is Verify.off and row.read), None)
    if fast is None:
        return []
    read, push = (1e3 * statistics.median(each) for each in (fast.read, fast.push))
    bars = []
    if found.setting.device == "cpu":
        ratio = statistics.median(r / m for r, m in zip(fast.read, fast.memcpy, strict=True))
        bars.append(("read to memcpy", ratio, "<=", MEMCPY))
        bars.append(("gather to read", gather / read, ">=", GATHER["cpu"]))
    else:
        if fast.case.parts == 1 and found.setting.ranks > 1:
            far = 1e3 * found.limits[FAR]
            bars.append(("read to the copy of the other ranks' rows", read / far, "<=", PEER))
        bars.append(("gather to push", gather / push, ">=", GATHER["cuda"]))
    return [
        {
            "what": what,
            "figure": figure,
            "relation": sign,
            "bar": bar,
            "met": figure <= bar if sign == "<=" else figure >= bar,
        }
        for what, figure, sign, bar in bars
    ]


def _met(figure: float, sign: str, bar: float) -> bool:
    return figure <= bar if sign == "<=" else figure >= bar


def text(told: Mapping[str, Any]) -> str:
    """The table of one model."""
    nbytes = told["bytes"]
    lines = [
        f"{told['name']}: {nbytes:,} bytes, fp32 shards on {told['ranks']} ranks, {told['device']}; medians in ms",
        "",
    ]
    lines.append(f"{'way':52}{'n':>4}{'push':>10}{'write':>10}{'read':>10}{'GB/s':>8}  bytes")
    for row in told["rows"]:
        if "failed" in row:
            lines.append(f"{row['way']:52}no figures: {row['failed']}")
            continue
        speed = nbytes / row["push_ms"] / 1e6
        parts = "".join(f"{row[f'{what}_ms']:10.2f}" for what in ("push", "write", "read"))
        lines.append(f"{row['way']:52}{row['n']:4}{parts}{speed:8.1f}  {'right' if row['verified'] else 'WRONG'}")
    lines.append(f"{'full_tensor() of each and broadcast':56}{told['gather_ms']:10.2f}")
    lines += [f"{'limit: ' + name:56}{ms:10.2f}" for name, ms in told["limits_ms"].items()]
    lines += [f"plan: {row['plan']}" for row in told["rows"][:1] if row.get("plan")]
    for bar in told["bars"]:
        verdict, limit = "OK" if bar["met"] else "missed", f"{bar['relation']} {bar['bar']:g}"
        lines.append(f"{verdict:6}  {bar['figure']:8.2f}  (bar: {limit})  {bar['what']}")
    return "\n".join(lines)
