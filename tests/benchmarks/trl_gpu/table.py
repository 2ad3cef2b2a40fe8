"""The table: a row for each side, and the two limits together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.benchmarks.trl_gpu.check import named
from tests.benchmarks.trl_gpu.common import BOTH, LEARNING, PLAIN, Row, utilisation
from tests.benchmarks.trl_gpu.shapes import Shape

COLUMNS: dict[str, Callable[[float], str]] = {  # heading -> how its numbers are written
    "step": "{:.2f}".format,
    "sample": "{:.2f}".format,
    "learn": "{:.2f}".format,
    "transfer": "{:.4f}".format,
    "samples/s": "{:.1f}".format,
    "MFU": "{:.1%}".format,
    "trainer GiB": "{:.1f}".format,
    "GPU GiB": "{:.1f}".format,
    "start": "{:.1f}".format,
}


def completed(rows: Sequence[Row], shape: Shape, peak: float) -> list[Row]:
    """The rows with what follows from them: the limits together, samples a second, MFU."""
    out = [dict(row) for row in rows]
    plain, learning = named(rows, PLAIN), named(rows, LEARNING)
    if plain and learning:
        both = {"row": BOTH, "sample": plain["sample"], "learn": learning["learn"]}
        both["step"] = both["sample"] + both["learn"]
        limits = [number for number, row in enumerate(out) if row["row"].startswith("limit")]
        out.insert(limits[-1] + 1, both | {"work": learning["work"]})
    for row in out:
        if row.get("step"):
            row["samples_per_s"] = shape.rows / row["step"]
        if row.get("work"):
            row["mfu"] = utilisation(shape, row["work"][-1], row.get("learn"), peak)
    return out


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown; of a row that failed or was skipped, the reason."""
    names = ["", *COLUMNS]
    cells = [[row["row"], *_cells(row)] for row in rows]
    widths = [max(len(line[n]) for line in [names, *cells]) for n in range(len(names))]
    body = [names, ["-" * width for width in widths], *cells]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in body]
    return [f"| {line} |" for line in lines] + [f"{row['row']}: {row['error']}" for row in rows if "error" in row]


def _cells(row: Row) -> list[str]:
    keys = {"samples/s": "samples_per_s", "MFU": "mfu", "trainer GiB": "trainer_gib", "GPU GiB": "gpu_gib"}
    values = ((row.get(keys.get(name, name)), written) for name, written in COLUMNS.items())
    return ["" if value is None else written(value) for value, written in values]
