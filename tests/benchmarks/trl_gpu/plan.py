"""Which parts there are, in which order, and how each is run: a process with a time limit and a log of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tests.benchmarks.trl_gpu.common import (
    DEFAULTS,
    LEARNING,
    LIGER,
    LOGPROBS,
    OURS,
    PLAIN,
    ROOT,
    TUNED,
    Row,
    results,
)
from tests.benchmarks.trl_gpu.shapes import Shape, Site

PACKAGE = "tests.benchmarks.trl_gpu"
PARTS = ("limits", "trl", "ours")
PATIENCE = 1.7  # a part may take so many times what is expected
ENOUGH = 0.8  # a part is begun if there is so much of the time that it is expected to take
GRACE_S = 20.0  # between SIGTERM and SIGKILL
LOST = {"padded rows": "model.attention=sdpa,model.compile=false,tokens_per_microbatch=16384"}
LOST_DRY = {"eager attention": "model.attention=eager"}
FITS = {"LoRA of rank 16": "model.lora.rank=16", "bfloat16 states": "optim.master_weights=false"}


@dataclass(frozen=True, slots=True)
class Part:
    """One process, and the rows that it measures."""

    name: str  # of its log
    module: str
    rows: tuple[str, ...]
    seconds: float  # expected
    arguments: tuple[str, ...] = ()
    extra: bool = False  # less important: after all others
    needs: str = ""  # a package, and a GPU

    def lacks(self, dry: bool) -> str:
        """Why it cannot run here; empty if it can."""
        if self.needs and find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return "it needs a GPU" if self.needs and dry else ""


def parts_of(shape: Shape, wanted: Iterable[str], lost: dict[str, str]) -> list[Part]:
    """All parts of a shape but the first, which makes the model; what matters most comes first."""
    seconds = shape.seconds
    if shape.fits:
        return [_ours(shape, f"ours, {name}", _overrides(text)) for name, text in FITS.items()]
    parts = {
        "ours": [_ours(shape, OURS, [])],
        "trl": [Part("trl", "trl_trainer", (TUNED, LIGER), seconds["trl"], needs="trl")],
        "limits": [
            Part("sampling", "sampling", (PLAIN, LOGPROBS), seconds["sampling"], needs="vllm"),
            Part("learning", "learning", (LEARNING,), seconds["learning"]),
        ],
    }
    found = [part for name, each in parts.items() if name in wanted for part in each]
    if "ours" in wanted:
        found += [_ours(shape, f"ours, {name}", _overrides(text), extra=True) for name, text in lost.items()]
    return found


def _ours(shape: Shape, row: str, overrides: Sequence[str], extra: bool = False) -> Part:
    name = re.sub(r"\W+", "-", row)
    return Part(name, "ours", (row,), shape.seconds["ours"], (row, *overrides), extra)


def _overrides(text: str) -> list[str]:
    """Split at the commas that an override follows: values may have commas, too."""
    return re.split(r",(?=[~+]?[\w.@/]+=)", text)


def rows_of_trl(shape: Shape, left: float, others: float) -> tuple[str, ...]:
    """TRL's defaults are measured in the same process, if there is time beside all that is still to come."""
    spare = left - others - shape.seconds["trl"]
    return (TUNED, LIGER, DEFAULTS) if spare >= shape.seconds["trl defaults"] else (TUNED, LIGER)


@dataclass(slots=True)
class Job:
    """One command: folders by shape, and the time that there is."""

    sites: dict[str, Site]
    deadline: float  # of time.monotonic()
    dry: bool
    kept: set[str]  # shapes whose measured rows are not measured again
    say: Callable[[str], None] = print

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def run(self, todo: Sequence[tuple[str, Part]]) -> dict[str, list[Row]]:
        """The rows of each shape; parts that are extra come last."""
        rows: dict[str, list[Row]] = {shape: [] for shape in self.sites}
        broken = {name: fault for name, site in self.sites.items() if (fault := self._make(site))}
        ordered = sorted(todo, key=lambda item: item[1].extra)
        for number, (shape, part) in enumerate(ordered):
            if shape in broken:
                rows[shape] += [{"row": row, "error": broken[shape]} for row in part.rows]
                continue
            others = sum(other.seconds for _, other in ordered[number + 1 :])
            found = self._measured(self.sites[shape], part, others)
            self.say("\n".join(map(in_short, found)))
            rows[shape] += found
        return rows

    def _make(self, site: Site) -> str:
        """Make the model and the prompts; why it failed, or nothing."""
        part = Part("make", "shapes", (), site.shape.seconds["make"])
        return self._process(site, part, part.seconds * 3, [])

    def _measured(self, site: Site, part: Part, others: float) -> list[Row]:
        """The part's rows; those without numbers say why."""
        rows, skipped = part.rows, []
        if part.module == "trl_trainer":
            rows = rows_of_trl(site.shape, self.left(), others)
            skipped = [] if DEFAULTS in rows else [DEFAULTS]
        log = site.folder / f"{part.name}.log"
        there = [row for row in results(log) if "error" not in row] if site.folder.name in self.kept else []
        if not there:
            log.unlink(missing_ok=True)
        missing = [row for row in rows if row not in {each["row"] for each in there}]
        skipped = [row for row in skipped if row not in {each["row"] for each in there}]
        fault = part.lacks(self.dry)
        if missing and not fault and self.left() < ENOUGH * part.seconds:
            fault = f"skipped: {self.left():.0f} of --seconds left, about {part.seconds:.0f} needed"
        if missing and not fault:
            chosen = missing if part.module == "trl_trainer" else part.arguments
            fault = self._process(site, part, min(PATIENCE * part.seconds, self.left()), chosen)
        found = results(log)
        latest = {each["row"]: each for each in [*there, *found]}
        faults = {row: {"row": row, "error": fault or "no result in its log"} for row in missing}
        told = {row: {"row": row, "error": "skipped: not enough of --seconds left"} for row in skipped}
        return list((told | faults | latest).values())

    def _process(self, site: Site, part: Part, limit: float, arguments: Iterable[str]) -> str:
        """Run a part; why it failed, or nothing."""
        log = site.folder / f"{part.name}.log"
        command = [sys.executable, "-m", f"{PACKAGE}.{part.module}", str(site.folder), *arguments]
        self.say(f"{site.folder.name}: {part.name}, at most {limit:.0f} s, {self.left():.0f} s left ...")
        began = time.monotonic()
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.dry else {}
        with log.open("a") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | hidden | {"PYTHONUNBUFFERED": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = _ended(process, limit)
        self.say(f"{site.folder.name}: {part.name} took {time.monotonic() - began:.0f} s")
        if code is None:
            return f"ended at its time limit, {limit:.0f} s; {log} has its log"
        return f"ended with {code}: {reason(log)}" if code else ""


def _ended(process: subprocess.Popen, limit: float) -> int | None:
    """The exit code; None where the process, and all that it started, had to be ended."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None


def in_short(row: Row) -> str:
    """What is known of a row, before the table is there."""
    seconds = [f"{key} {row[key]:.3f}" for key in ("step", "sample", "learn", "transfer") if row.get(key)]
    return f"  {row['row']}: {', '.join(seconds) or row.get('error')}"


def reason(log: Path) -> str:
    """The last line of a log that names an error, or the last lines."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Set the environment variable HYDRA_FULL_ERROR")]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|Key '", line)]
    return "; ".join(errors[-1:] or lines[-3:] or ["no output"])[-300:]
