"""Kills of a run that samples ahead: no prompt is lost or learned from twice, and no sample is older than its lag.

    python tests/ahead/kills.py [--kills 500] [--seed 0] [--lag 3]

A run of `rollout.ahead.order=free` is killed (kill -9) at moments drawn by the seed, the trainer or one of its two
workers in turn; a trainer that is dead goes on by `rlhf.resume`. At the end the ledger is read. Exit code 1 if it is
not what it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
os.environ["PYTHONPATH"] = str(ROOT)

import forked  # noqa: E402  (found by the line above)
from ledger import expected, learned_from  # noqa: E402

SIZE, SEED, STEPS = 4, 0, 100_000
COMMAND = (
    *("experiment=smoke", "logger=jsonl", "task.held_out=16", "task.prompts=64", "sft.steps=4", f"steps={STEPS}"),
    *(f"prompts_per_step={SIZE}", f"seed={SEED}", "checkpoint.every=1", "evaluate_every=1", "rollout.workers=2"),
    *("rollout.ahead.order=free", "rollout.in_flight=keep", "algo.correction=tis", "rollout.restarts=100000"),
)
START_S = 90.0  # until a run that was started has made a step
ALIVE_S = 0.8  # of life, at most, from one kill to the next


class Run:
    """The run, as often as it is started."""

    def __init__(self, folder: Path, lag: int) -> None:
        self.folder, self._lag = folder / "run", lag
        self._output = (folder / "output").open("w")
        self.process = self._started("rlhf.train", *COMMAND, f"rollout.ahead.lag={lag}", f"hydra.run.dir={self.folder}")

    def _started(self, *command: str) -> subprocess.Popen[bytes]:
        self.steps_at_start = self.steps()
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )

    def steps(self) -> int:
        """Rows of metrics, by now."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def moves(self) -> None:
        """Wait until it has done a step since its last start."""
        deadline = time.monotonic() + START_S
        while self.steps() <= self.steps_at_start:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the run does not go on: {(self.folder.parent / 'output').read_text()[-2000:]}")
            time.sleep(0.01)

    def kill_worker(self, draw: random.Random) -> None:
        """One of those that are there."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        workers = [each for each in children if "rlhf.rollout.worker" in " ".join(_command(each))]
        if workers:
            os.kill(draw.choice(workers).pid, signal.SIGKILL)
        self.steps_at_start = self.steps()

    def kill_trainer(self) -> None:
        """And go on."""
        self.process.kill()
        self.process.wait(30)
        self.process = self._started("rlhf.resume", str(self.folder))

    def end(self) -> int:
        """Stop it: the steps that it has saved."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self._output.close()
        return max(int(path.name) for path in (self.folder / "checkpoints").glob("0*"))


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def faults(folder: Path, lag: int) -> list[str]:
    """What is not as it must be."""
    found, learned = [], learned_from(folder)
    if learned != expected(SIZE, SEED, len(learned)):
        found.append("the prompts that were learned from are not those of the stream, each once, in order")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lags = [row["rollout/lag_max"] for row in rows if "rollout/lag_max" in row]
    if max(lags) > lag:
        found.append(f"a sample was {max(lags):g} versions old")
    return found


def main() -> None:
    """Kill, and look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lag", type=int, default=3)
    options = parser.parse_args()
    forked.use()
    draw, began = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-ahead-") as place:
        run = Run(Path(place), options.lag)
        try:
            for kill in range(options.kills):
                run.moves()
                time.sleep(draw.random() * ALIVE_S)
                run.kill_trainer() if kill % 2 else run.kill_worker(draw)
                if kill % 25 == 24:
                    print(f"{kill + 1} kills, {run.steps()} rows, {time.monotonic() - began:.0f} s", flush=True)
            run.moves()
            saved = run.end()
        finally:
            run.process.kill()
        learned, found = learned_from(run.folder), faults(run.folder, options.lag)
        restarts = (run.folder / "journal/trainer.jsonl").read_text().count('"rejoin"')
    print(
        f"{options.kills} kills, {saved} steps saved, {len(learned)} prompts in the ledger, {restarts} workers taken "
        f"back, {time.monotonic() - began:.0f} s: {'; '.join(found) or 'none lost, none twice, none too old'}"
    )
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
