"""A GRPO step of this project against TRL's GRPOTrainer, in one run: `python tests/benchmarks/compare_trl.py`.

The same checkpoint (Qwen3, 4 layers x 128), prompts (arithmetic) and sizes (32 prompts x 8 samples, at most 8
tokens), exact match as reward, one torch thread a process. TRL is installed into an environment of its own on the
first run. Rounds alternate, so that a slow minute of the machine hits everyone; the median over all steps of all
rounds counts, first steps left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRL = "trl==1.16.0"
WARM_UP = 5  # steps of each round that do not count
VARIANTS = {
    "TRL, its defaults": {"model_bf16": False, "attention": "sdpa"},
    "TRL, best tuning (bf16 model, eager attention, no checkpointing)": {
        "model_bf16": True,
        "attention": "eager",
        "bf16": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
    },
}


def main() -> None:
    """Run all rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--trl-python", type=Path, help="a Python that has TRL; default: an environment made here")
    options = parser.parse_args()
    python = options.trl_python or environment()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        print("making the checkpoint ...", flush=True)
        checkpoint = make_checkpoint(work)
        seconds: dict[str, list[float]] = {name: [] for name in [*VARIANTS, "ours"]}
        notes: dict[str, str] = {}
        for number in range(options.rounds):
            for name, settings in VARIANTS.items():
                print(f"round {number + 1}/{options.rounds}: {name} ...", flush=True)
                result = trl_steps(python, checkpoint, work / "prompts.jsonl", options.steps, settings)
                seconds[name] += result["seconds"][WARM_UP:]
                notes[name] = note(result["rewards"], result["lengths"])
            print(f"round {number + 1}/{options.rounds}: ours ...", flush=True)
            taken, notes["ours"] = our_steps(checkpoint, work / f"ours-{number}", options.steps)
            seconds["ours"] += taken
    show(seconds, notes)


def environment() -> Path:
    """The Python of TRL's own environment, made on the first run."""
    folder = ROOT / ".venv-trl"
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {TRL} into {folder} (minutes, once) ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "torch>=2.11,<2.14", TRL], check=True)
    return python


def make_checkpoint(work: Path) -> Path:
    """Warm the bench's model up by SFT, so that answers end; write it and the prompts."""
    run_ours(work / "warm-up", ["steps=1", "model.dtype=float32", "model.attention=sdpa", "model.compile=false"])
    from rlhf.config import ArithmeticTaskConfig
    from rlhf.tasks import read_task

    task = read_task(ArithmeticTaskConfig(), 0)
    with open(work / "prompts.jsonl", "w") as file:
        for row in task.train:
            file.write(json.dumps({"prompt": row.question, "answer": row.demonstration}) + "\n")
    return work / "warm-up" / "policy"


def run_ours(folder: Path, overrides: list[str]) -> None:
    """One run of experiment=step_bench."""
    command = [sys.executable, "-m", "rlhf.train", "experiment=step_bench", f"hydra.run.dir={folder}", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=single_threaded(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def our_steps(checkpoint: Path, folder: Path, steps: int) -> tuple[list[float], str]:
    """Seconds of our steps, weight transfer included, on the checkpoint."""
    run_ours(
        folder,
        [
            "model=hf",
            f"model.path={checkpoint}",
            "sft.steps=0",
            f"steps={steps}",
        ],
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "seconds/step" in row]
    return [row["seconds/step"] for row in rows[WARM_UP:]], note(
        [row["train/reward"] for row in rows], [row["train/tokens_per_row"] for row in rows]
    )


def trl_steps(python: Path, checkpoint: Path, prompts: Path, steps: int, settings: dict) -> dict:
    """One round of TRL."""
    script = Path(__file__).with_name("trl_step.py")
    command = [python, script, checkpoint, prompts, str(steps), json.dumps(settings)]
    done = subprocess.run(list(map(str, command)), env=single_threaded(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"TRL failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def single_threaded() -> dict[str, str]:
    """One thread a process, and no hub."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def note(rewards: list[float], lengths: list[float]) -> str:
    """What was learned from and how long answers were, to see that both do the same work."""
    return f"{statistics.mean(lengths):.2f} tokens an answer, mean reward {statistics.mean(rewards):.2f}"


def show(seconds: dict[str, list[float]], notes: dict[str, str]) -> None:
    """Median, min and max of a step, and the ratio to TRL's best."""
    best = min(statistics.median(values) for name, values in seconds.items() if name != "ours")
    print(f"\n{'seconds a step':<68}{'median':>8}{'min':>8}{'max':>8}{'x best TRL':>12}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:<68}{median:8.3f}{min(values):8.3f}{max(values):8.3f}{median / best:12.2f}   {notes[name]}")


if __name__ == "__main__":
    main()
