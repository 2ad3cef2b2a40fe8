"""GPU checks of what a run is trusted with: that it goes on after a kill, and that what it tells of itself is so."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from processes import ROOT, output, rows_of

DEADLINE_S = 300.0
RUN = ("experiment=smoke", "model.hidden=128", "steps=12", "checkpoint.every=3", "evaluate_every=4", "logger=[jsonl]")
CHOICES = {
    "grpo": ("algo=grpo", "algo.kl_target=0.01"),
    "ppo": ("algo=ppo", "algo.critic_warmup_steps=1"),
    "bfloat16": ("algo=grpo", "model.dtype=bfloat16", "transfer.staging=live"),
}
OWN = ("state.json", "rows.jsonl", "config.json")  # hold times


def killed_runs_go_on(folder: Path) -> str:
    """A trainer on the GPU is killed twice; the resumed run ends with the bits and numbers of one that was not."""
    killed = []
    for name, choice in CHOICES.items():
        whole = _trained(folder / f"{name}-whole", *choice)
        run = folder / f"{name}-killed"
        command = [sys.executable, "-m", "rlhf.train", f"hydra.run.dir={run}", *RUN, *choice]
        for rows in (4, 10):
            _kill_after(command, run, rows)
            command = [sys.executable, "-m", "rlhf.resume", str(run)]
        output(command, run.with_suffix(".log"), DEADLINE_S)
        mine, theirs = _state(run), _state(whole)
        assert mine["metrics"] == theirs["metrics"], f"{name}: the numbers differ"
        differ = [each for each in theirs["files"] if mine["files"].get(each) != theirs["files"][each]]
        assert not differ, f"{name}: {differ} differ"
        killed.append(f"{name} ({len(theirs['files'])} files)")
    return f"bit for bit after two kills: {', '.join(killed)}"


def a_check_tells_what_a_run_takes(folder: Path, *overrides: str) -> str:
    """`mode=check` of a large model, whose estimate is beside the most memory that its step had."""
    command = [sys.executable, "-m", "rlhf.train", "mode=check", f"hydra.run.dir={folder / 'checked'}", *overrides]
    said = output(command, folder / "check.log", DEADLINE_S)
    assert not (folder / "checked").exists()
    lines = [line.strip() for line in said.splitlines() if "most " in line or "trainer, on" in line]
    return "; ".join(" ".join(line.strip("│ ").split()) for line in lines)


def a_step_is_traced(folder: Path) -> str:
    """The trace of a step holds kernels; status and report of the run have the GPU's memory and are whole."""
    run = folder / "traced"
    command = [sys.executable, "-m", "rlhf.train", f"hydra.run.dir={run}", *RUN, "profile.steps=[3]"]
    output(command, run.with_suffix(".log"), DEADLINE_S)
    for trace in ("step-3.json.gz", "step-3-worker-0.json.gz"):
        events = json.loads(gzip.decompress((run / "profile" / trace).read_bytes()))["traceEvents"]
        kernels = sum(event.get("cat") == "kernel" for event in events)
        assert kernels > 100, f"{trace}: {kernels} kernels of {len(events)} events"
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "finished" and status["gpu_memory_mib/trainer"] > 1
    output([sys.executable, "-m", "rlhf.report", str(run)], run.with_suffix(".report"), DEADLINE_S)
    page = (run / "report.html").stat().st_size
    assert 50_000 < page < 2_000_000
    return f"{kernels} kernels in step 3; {status['gpu_memory_mib/trainer']:.0f} MiB; report of {page / 1e6:.2f} MB"


def _trained(folder: Path, *overrides: str) -> Path:
    command = [sys.executable, "-m", "rlhf.train", f"hydra.run.dir={folder}", *RUN, *overrides]
    output(command, folder.with_suffix(".log"), DEADLINE_S)
    return folder


def _kill_after(command: list[str], folder: Path, rows: int) -> None:
    """Run it until it has logged so many rows, and kill its trainer."""
    with folder.with_suffix(f".{rows}").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + DEADLINE_S
        while len(rows_of(folder)) < rows:
            assert process.poll() is None, f"ended too early: {process.returncode}"
            assert time.monotonic() < deadline, "too slow"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL


def _state(folder: Path) -> dict[str, Any]:
    """The hashes of what a run ends with, and its metrics but for times."""
    newest = sorted(folder.glob("checkpoints/0*"))[-1]
    files = json.loads((newest / "manifest.json").read_text())["files"]
    rows = [
        {k: v for k, v in row.items() if not k.startswith(("seconds/", "transfer/", "tokens_per_"))}
        for row in rows_of(folder)
    ]
    return {"files": {name: file["sha256"] for name, file in files.items() if name not in OWN}, "metrics": rows}
