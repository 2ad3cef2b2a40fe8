"""The command line: everything that was asked for is checked before torch or ray is imported."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from transfer.bench.shapes import NAMED, BenchError, Model, model_named
from transfer.bench.ways import CPU, CUDA, SENDERS, selected

if TYPE_CHECKING:
    from transfer.bench.gpu import Gpus

SHAPES = {CPU: ["1mb", "512mb"], CUDA: ["qwen2.5-0.5b", "qwen2.5-7b"]}  # by default
DEVICE = re.compile(r"cuda(:[0-9]{1,3})?")
RECEIVERS = re.compile(r"[1-8]|tp[2-8]")
REPEATS_OF_RANKS = 9
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
    defaults = f"default: {','.join(SHAPES[CPU])}, on a GPU {','.join(SHAPES[CUDA])}"
    add("--shapes", type=_list, metavar="A,B", help=f"{shapes}; {defaults}")
    add("--scale", type=float, default=1.0, metavar="S", help="multiply each tensor's first dimension; default: 1")
    add("--repeats", type=int, metavar="N", help="rounds a model; default: 15 for small models, 5 for others; GPU: 20")
    add("--only", type=_list, default=[], metavar="A,B", help="time only ways whose name contains one of these texts")
    add("--skip", type=_list, default=[], metavar="A,B", help="leave out ways whose name contains one of these texts")
    add("--senders", type=_list, default=list(SENDERS), metavar="A,B", help="http, ray; default: both. http: no Ray")
    add("--device", default=CPU, help="where the weights are: cpu, cuda, cuda:1; default: cpu")
    add("--receiver", metavar="DEVICE", help="the GPU of the receiver; default: the one of --device")
    add("--ranks", type=int, metavar="N", help="a trainer of so many ranks with shards, beside gathering them")
    add("--receivers", metavar="N|tpN", help="with --ranks: N workers that hold all, or one cut in N parts; default: 1")
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

    torch.set_num_threads(1)
    gpus = _gpus(options)
    report: dict[str, Any] = {"machine": _machine(torch.__version__, gpus), "models": []}
    if gpus is not None and options.json != "-":
        print(_headline(report["machine"]), end="\n\n")
    if options.ranks is not None:
        _run_ranks(options, models, report)
        return
    with closing(_timed(models, names, options.repeats, gpus)) as timed:
        for model, told in zip(models, timed, strict=True):
            report["models"].append(told)
            if options.json != "-":
                print(table.table_text(model, told["rows"], told["bars"]), end="\n\n")
    if options.json != "-":
        print(table.legend(CPU if gpus is None else CUDA))
    _write_json(report, options.json)


def _run_ranks(options: argparse.Namespace, models: Sequence[Model], report: dict[str, Any]) -> None:
    from transfer.bench import measure, ranks, ranks_table

    workers, _, parts = options.receivers.partition("tp")
    for model in models:
        _check_of_ranks(model)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True, prefix="bench-") as folder:
            setting = ranks.Setting(
                model=model,
                ranks=options.ranks,
                workers=int(workers or 1),
                parts=int(parts or 1),
                device=options.device.partition(":")[0],
                repeats=options.repeats or REPEATS_OF_RANKS,
                folder=Path(folder),
                progress=measure.Progress(),
            )
            try:
                found = ranks.measured(setting)
            except measure.Unavailable as error:
                raise BenchError(f"--ranks {options.ranks}: {error}") from None
        report["models"].append(ranks_table.as_json(found))
        if options.json != "-":
            print(ranks_table.text(report["models"][-1]), end="\n\n")
    _write_json(report, options.json)


def _check_of_ranks(model: Model) -> None:
    for name, (dtype, shape) in model.tensors.items():
        if not ("float" in dtype and shape):
            raise BenchError(
                f"--ranks: tensors must have floating-point rows ({model.name}: {name} is {dtype} {shape})"
            )


def _gpus(options: argparse.Namespace) -> Gpus | None:
    """The two GPUs; None for the CPU."""
    if options.device == CPU:
        return None
    from transfer.bench.gpu import found

    return found(options.device, options.receiver)


def _timed(
    models: Sequence[Model], names: Sequence[str], repeats: int | None, gpus: Gpus | None
) -> Generator[dict[str, Any], None, None]:
    """Each model's rows and bars."""
    from transfer.bench import gpu_bars, gpu_measure, measure, table

    for model in models:
        if gpus is None:
            measure.memory_left(model)
        else:
            gpu_measure.check_fits(model, gpus)
    progress = measure.Progress()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True, prefix="bench-")))
        where = folder / "ray"
        ray = measure.ray_for(models, names, where) if gpus is None else gpu_measure.ray_for(names, where)
        if ray is not None:
            progress("starting Ray", always=True)
            stack.enter_context(ray)
        for index, model in enumerate(models):
            place = folder / str(index)
            place.mkdir()
            if gpus is None:
                rows = measure.timed_model(model, names, repeats, place, ray, progress)
                told = [table.row_json(row, model) for row in rows]
                bars = table.bars_json(told, model)
            else:
                rows = gpu_measure.timed_on_gpus(model, names, repeats, gpus, (place, ray), progress)
                told = [table.row_json(row, model, CUDA) for row in rows]
                bars = gpu_bars.bars_json(told, model, gpus.same)
            yield {"name": model.name, "bytes": model.nbytes, "rows": told, "bars": bars}


def _check_device(options: argparse.Namespace) -> None:
    """Both GPUs get a number."""
    if options.device != CPU and not DEVICE.fullmatch(options.device):
        raise BenchError(f"--device must be cpu, cuda or like cuda:1 (got {options.device!r})")
    if options.receiver is not None and (options.device == CPU or not DEVICE.fullmatch(options.receiver)):
        raise BenchError(f"--receiver must be like cuda:1, and needs --device cuda (got {options.receiver!r})")
    if options.device != CPU:
        options.device = _numbered(options.device)
        options.receiver = _numbered(options.receiver or options.device)


def _check_ranks(options: argparse.Namespace) -> None:
    if options.ranks is None:
        if options.receivers is not None:
            raise BenchError("--receivers needs --ranks")
        return
    if not 2 <= options.ranks <= 16:
        raise BenchError(f"--ranks must be from 2 to 16 (got {options.ranks})")
    options.receivers = options.receivers or "1"
    if not RECEIVERS.fullmatch(options.receivers):
        raise BenchError(f"--receivers must be from 1 to 8, or from tp2 to tp8 (got {options.receivers!r})")


def _numbered(device: str) -> str:
    return f"{CUDA}:{int(device.partition(':')[2] or 0)}"


def _checked(options: argparse.Namespace) -> tuple[list[Model], list[str]]:
    _check_device(options)
    device = CPU if options.device == CPU else CUDA
    if options.shapes is None:
        options.shapes = SHAPES[device]
    if not 0 < options.scale <= 1:
        raise BenchError(f"--scale must be above 0, at most 1 (got {options.scale:g})")
    if options.repeats is not None and options.repeats < 1:
        raise BenchError(f"--repeats must be at least 1 (got {options.repeats})")
    unknown = [sender for sender in options.senders if sender not in SENDERS]
    if unknown or not options.senders:
        raise BenchError(f"--senders must be some of {', '.join(SENDERS)} (got {', '.join(options.senders)!r})")
    if not options.shapes:
        raise BenchError("--shapes names no model")
    _check_ranks(options)
    if options.json not in (None, "-") and not Path(options.json).absolute().parent.is_dir():
        raise BenchError(f"--json: there is no folder for {options.json}")
    models = [model_named(text) for text in options.shapes]
    if options.scale != 1:
        models = [model.scaled(options.scale) for model in models]
    return models, selected(options.senders, options.only, options.skip, device)


def _machine(torch_version: str, gpus: Gpus | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch_version,
    }
    if gpus is None:
        return told
    from transfer.bench.gpu import machine

    return told | machine(gpus)


def _headline(machine: dict[str, Any]) -> str:
    gpus = ", ".join(dict.fromkeys(machine["gpus"]))
    return f"{machine['date']}; {gpus}; driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}"


def _write_json(report: dict[str, Any], target: str | None) -> None:
    if target is None:
        return
    text = json.dumps(report, indent=1)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise BenchError(f"--json: {error}") from None


def _terminated(*_: object) -> None:
    raise SystemExit(TERMINATED)
