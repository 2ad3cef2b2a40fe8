"""A training step of this project beside TRL's and beside the limits of the card, in one run.

python -m tests.benchmarks.compare_trl_gpu [--shapes SHAPE,...] [--parts limits,trl,ours] [--json FILE]

Needs one GPU, vLLM 0.24, TRL 1.16 and liger_kernel; with --dry it tries everything that a CPU can, on a tiny model.
Each part is a process with a time limit and a log in the work folder; one that fails costs its rows. The exit code is
1 if two sides did not do the same work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf.shell.ending import terminate_as_interrupt
from tests.benchmarks.trl_gpu.check import bar_lines, work_lines
from tests.benchmarks.trl_gpu.common import PEAK, Row
from tests.benchmarks.trl_gpu.plan import LOST, LOST_DRY, PARTS, Job, parts_of
from tests.benchmarks.trl_gpu.shapes import SHAPES, Shape, Site, sized
from tests.benchmarks.trl_gpu.table import completed, table

PACKAGES = ("torch", "transformers", "vllm", "trl", "liger_kernel")


def main() -> int:
    """Measure, and print a table for each shape."""
    options = arguments()
    terminate_as_interrupt()  # parts are ended, too
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(options.work or temporary).resolve()
        deadline = time.monotonic() + options.seconds
        sites = {name: Site(work / name, _shape(name, options), options.steps) for name in options.shapes}
        same = {name for name, site in sites.items() if site.write()}
        job = Job(sites, deadline, options.dry, same if options.keep else set(), lambda line: print(line, flush=True))
        todo = [
            (name, part) for name, site in sites.items() for part in parts_of(site.shape, options.parts, _lost(options))
        ]
        rows = job.run(todo)
    report: dict[str, Any] = {"machine": machine(), "peak_flops": options.peak, "shapes": {}}
    agreed = True
    for name, site in sites.items():
        told, same_work = show(name, site.shape, rows[name], options)
        report["shapes"][name] = told
        agreed = agreed and same_work
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return 0 if agreed else 1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", "--shape", type=_names, help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--parts", type=_names, default=list(PARTS), help="limits, trl, ours; default: all")
    parser.add_argument("--steps", type=int, default=3, help="steps of a run; the first does not count")
    parser.add_argument("--ours", action="append", metavar="NAME=OVERRIDE,...", help="another run of ours; repeatable")
    parser.add_argument("--prompts", type=int, help="prompts a step, instead of the shape's")
    parser.add_argument("--group", type=int, help="rows a prompt, instead of the shape's")
    parser.add_argument("--new", type=int, help="tokens sampled a row, instead of the shape's")
    parser.add_argument("--seconds", type=float, default=570, help="of the whole command; then rows are skipped")
    parser.add_argument("--peak", type=float, default=PEAK, help="bfloat16 FLOP/s of the card, for MFU")
    parser.add_argument("--work", help="a folder for models, runs and logs; default: one that is removed again")
    parser.add_argument("--keep", action="store_true", help="leave out what an earlier call has measured in --work")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to a file, too")
    parser.add_argument("--dry", action="store_true", help="try the command on a CPU, with a tiny model")
    options = parser.parse_args()
    if not options.dry and shutil.which("nvidia-smi") is None:
        parser.error("there is no GPU here (no nvidia-smi): try --dry")
    options.shapes = options.shapes or (["nano"] if options.dry else ["qwen2.5-0.5b", "qwen2.5-1.5b"])
    if unknown := [*(set(options.shapes) - set(SHAPES)), *(set(options.parts) - set(PARTS))]:
        parser.error(f"unknown: {', '.join(unknown)}; shapes: {', '.join(SHAPES)}; parts: {', '.join(PARTS)}")
    return options


def _names(text: str) -> list[str]:
    return text.split(",")


def _shape(name: str, options: argparse.Namespace) -> Shape:
    return sized(SHAPES[name], options.prompts, options.group, options.new)


def _lost(options: argparse.Namespace) -> dict[str, str]:
    """Settings of ours that lost, by name; `--ours none` leaves them out."""
    if options.ours is None:
        return LOST_DRY if options.dry else LOST
    return dict(text.split("=", 1) for text in options.ours if text != "none")


def show(name: str, shape: Shape, rows: list[Row], options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Print a shape's table; what there is to write of it, and whether all sides did the same work."""
    order = ("limit", "TRL", "ours")
    rows = sorted(rows, key=lambda row: next(n for n, word in enumerate(order) if row["row"].startswith(word)))
    compared, agreed = work_lines(rows)
    rows = completed(rows, shape, options.peak)
    print(f"\n{name}: {shape.prompts} prompts x {shape.group} rows, {shape.new} tokens a row, {options.steps} steps")
    print("\n".join(table(rows)), end="\n\n")
    bars = bar_lines(rows, shape.bars)
    print("\n".join([*compared, *bars]), flush=True)
    return {"rows": rows, "work": compared, "bars": bars}, agreed


def machine() -> dict[str, str]:
    """The GPU, and the packages that matter."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.strip()
    except FileNotFoundError:
        gpu = ""
    return {"gpu": gpu or "none"} | {name: found for name in PACKAGES if (found := _version(name))}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
