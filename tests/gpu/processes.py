"""What the GPU scripts share: commands with a deadline, what runs have logged, and how full a GPU is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, float]


def output(command: list[str], log: Path, deadline_s: float) -> str:
    """What a command prints, which `log` keeps; RuntimeError with the end of it if it fails."""
    with log.open("w") as file:
        ended = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=deadline_s)
    printed = log.read_text()
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{printed[-3000:]}")
    return printed


def rows_of(folder: Path) -> list[Row]:
    """What a run has logged so far."""
    try:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line[-1:] == "}"]
    except FileNotFoundError:
        return []


def series(rows: list[Row], key: str) -> list[float]:
    """The values of one metric, where it was measured."""
    return [row[key] for row in rows if key in row]


def memory_used(gpu: str) -> int:
    """MiB of a GPU that are taken, by whom ever; without a CUDA context of one's own."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={gpu}"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout)
