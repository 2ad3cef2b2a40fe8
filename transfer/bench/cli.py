"""The command line: everything that was asked for is checked before torch or ray is imported."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from transfer.bench.shapes import NAMED, BenchError, Model, model_named
from transfer.bench.ways import SENDERS, selected

USAGE, INTERRUPTED, TERMINATED = 2, 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit codes, as shells have them


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and one line for what cannot be done, 130 after Ctrl-C."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _run(_parser().parse_args(arguments))
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USAGE) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for everything else that cannot be done."""
        raise BenchError(f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m transfer.bench",
        description="Times every way to move a model's weights to another process, side by side in one run.",
    )
    add = parser.add_argument
    shapes = f"models: {', '.join(NAMED)}, a JSON file " + '{"name": [2, 3]} (bf16), or a .safetensors file'
    add("--shapes", type=_list, default=["1mb", "512mb"], metavar="A,B", help=f"{shapes}; default: 1mb,512mb")
    add("--repeats", type=int, metavar="N", help="rounds a model; default: 15 for small models, 5 for others")
    add("--only", type=_list, default=[], metavar="A,B", help="time only ways whose name contains one of these texts")
    add("--skip", type=_list, default=[], metavar="A,B", help="leave out ways whose name contains one of these texts")
    add("--senders", type=_list, default=list(SENDERS), metavar="A,B", help="http, ray; default: both. http: no Ray")
    add("--device", default="cpu", help="where the weights are: cpu")
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="JSON to FILE as well; without FILE to stdout, no table",
    )
    return parser


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _run(options: argparse.Namespace) -> None:
    models, names = _checked(options)
    os.environ["OMP_NUM_THREADS"] = "1"  # of all processes, before torch is imported
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    import torch

    from transfer.bench import table
    from transfer.bench.measure import Progress, memory_left, ray_for, timed_model

    torch.set_num_threads(1)
    for model in models:
        memory_left(model)
    progress = Progress()
    report: dict[str, Any] = {"machine": _machine(torch.__version__), "models": []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True, prefix="bench-")))
        ray = ray_for(models, names, folder / "ray")
        if ray is not None:
            progress("starting Ray", always=True)
            stack.enter_context(ray)
        for index, model in enumerate(models):
            place = folder / str(index)
            place.mkdir()
            rows = timed_model(model, names, options.repeats, place, ray, progress)
            told = [table.row_json(row, model) for row in rows]
            bars = table.bars_json(told, model)
            report["models"].append({"name": model.name, "bytes": model.nbytes, "rows": told, "bars": bars})
            if options.json != "-":
                print(table.table_text(model, told, bars), end="\n\n")
    if options.json != "-":
        print(table.legend())
    _write_json(report, options.json)


def _checked(options: argparse.Namespace) -> tuple[list[Model], list[str]]:
    if options.device != "cpu":
        raise BenchError(f"--device must be cpu, which is all that can be timed so far (got {options.device!r})")
    if options.repeats is not None and options.repeats < 1:
        raise BenchError(f"--repeats must be at least 1 (got {options.repeats})")
    unknown = [sender for sender in options.senders if sender not in SENDERS]
    if unknown or not options.senders:
        raise BenchError(f"--senders must be some of {', '.join(SENDERS)} (got {', '.join(options.senders)!r})")
    if not options.shapes:
        raise BenchError("--shapes names no model")
    if options.json not in (None, "-") and not Path(options.json).absolute().parent.is_dir():
        raise BenchError(f"--json: there is no folder for {options.json}")
    return [model_named(text) for text in options.shapes], selected(options.senders, options.only, options.skip)


def _machine(torch_version: str) -> dict[str, Any]:
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch_version,
    }


def _write_json(report: dict[str, Any], target: str | None) -> None:
    if target is None:
        return
    text = json.dumps(report, indent=1)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n")
    except OSError as error:
        raise BenchError(f"--json: {error}") from None


def _terminated(*_: object) -> None:
    raise SystemExit(TERMINATED)
