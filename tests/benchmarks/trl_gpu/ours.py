"""One run of this project on the work that all sides do.

python -m tests.benchmarks.trl_gpu.ours FOLDER ROW [OVERRIDE ...]

The run is `python -m rlhf.train` in this process, in which two methods also note what each step learned from and how
long the worker took to start.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.trl_gpu.common import GpuMemory, Row, counted, device, median, most_allocated, say, work_of
from tests.benchmarks.trl_gpu.shapes import HELD_OUT, SEED, Site

PHASES = ("step", "sample", "learn", "transfer")


def main(folder: str, row: str, *overrides: str) -> None:
    """Train, and say what was measured, also of a run that failed."""
    site = Site.read(folder)
    out = site.folder / "runs" / re.sub(r"\W+", "-", row)
    noted = note()
    sys.argv = ["rlhf.train", *command(site, out), *overrides]
    print("RUN", " ".join(sys.argv), flush=True)
    from rlhf.train import main as train

    failed: dict[str, str] = {}
    with GpuMemory() as memory:
        try:
            train()
        except SystemExit as end:
            failed = {"error": f"the run ended with {end.code}"} if end.code else {}
    shutil.rmtree(out / "policy", ignore_errors=True)  # as large as the model
    rows = _steps(out / "metrics.jsonl")
    if failed and not rows:  # the last line of the log says why
        raise SystemExit(1)
    peaks = {"trainer_gib": most_allocated(), "gpu_gib": memory.peak}
    say(row, **_seconds(rows), **peaks, **noted, **failed)


def command(site: Site, out: Path) -> list[str]:
    """The overrides of every run."""
    shape = site.shape
    engine = {"gpu_memory_utilization": shape.share, "max_model_len": shape.longest, "max_num_seqs": shape.rows}
    pairs = ", ".join(f"{key}: {value}" for key, value in engine.items())
    rollout = ["rollout=vllm", f"rollout.engine_args={{{pairs}}}"] if device() == "cuda" else ["rollout=hf"]
    return [
        *("experiment=checkpoint", f"model.path={site.model}", "model.dtype=bfloat16", "algo.kl_coef=0"),
        *("task=jsonl", f"task.path={site.prompts}", f"task.held_out={HELD_OUT}", f"seed={SEED}"),
        *("reward=function", "reward.function=tests.benchmarks.trl_gpu.common:reward"),
        *(*rollout, f"rollout.max_new_tokens={shape.new}", "rollout.mismatch_alarm=null"),
        *("transfer.take=copy", "transfer.staging=live", "transfer.sender.start_timeout_s=300"),
        *(f"prompts_per_step={shape.prompts}", f"samples_per_prompt={shape.group}", f"steps={site.steps}"),
        *("evaluate_every=1000", "checkpoint.every=0", "logger=[jsonl,console]"),
        *(f"hydra.run.dir={out}", "hydra.output_subdir=hydra"),
    ]


def note() -> dict[str, Any]:
    """Let a run of this process note the work of its steps, and the seconds until its workers were up."""
    from rlhf.monitor.metrics import Recorder
    from rlhf.rollout.launch import Workers

    noted: dict[str, Any] = {"work": [], "start": None}
    took, enter, senders = Recorder.took, Workers.__enter__, Workers.senders
    began = time.perf_counter()

    def noting_enter(self: Workers) -> Workers:
        nonlocal began
        began = time.perf_counter()
        return enter(self)

    def noting_senders(self: Workers) -> Any:
        found = senders(self)
        noted["start"] = noted["start"] or time.perf_counter() - began
        return found

    def noting_took(self: Recorder, rollouts: Any, version: int) -> None:
        noted["work"].append(work_of([prompt.ids for prompt in rollouts.prompts_B], int(rollouts.tokens)))
        took(self, rollouts, version)

    Recorder.took, Workers.__enter__, Workers.senders = noting_took, noting_enter, noting_senders  # type: ignore[method-assign]
    return noted


def _steps(path: Path) -> list[Row]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "seconds/step" in row]


def _seconds(rows: list[Row]) -> Row:
    """Medians over the steps that count."""
    series = {phase: [row[f"seconds/{phase}"] for row in rows] for phase in PHASES}
    seconds: Row = {phase: median(counted(values)) for phase, values in series.items()}
    return seconds | {"steps": [round(each, 3) for each in series["step"]]}


if __name__ == "__main__":
    main(*sys.argv[1:])
