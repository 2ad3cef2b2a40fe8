"""Real runs of several ranks for the tests: commands in one folder, harm that is done in them, and what they leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from living import living_in
from shared_memory import left_in_shared_memory

ROOT = Path(__file__).resolve().parents[2]
RUN_S = 150.0
GONE_S = 30.0  # how long what ends by itself may take on a busy machine
ASLEEP_S = 600.0  # how long harm sleeps: whoever waits for it is late
HARM, WHEN = "TEST_HARM", "harmed"  # a variable; a file with the time at which it was done
SMALL = (
    *("experiment=smoke", "logger=[console,jsonl]", "task.held_out=8", "task.prompts=64", "prompts_per_step=4"),
    *("sft.steps=4", "sft.batch_size=24", "steps=3", "checkpoint.every=1", "tokens_per_microbatch=220"),
    *("reward=function", "reward.function=mine:score", "plugins=[mine]", "hydra.run.dir=run"),
)
MINE = f'''
"""A reward that harms the run while a step is sampled, and a learner that does so while it learns."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil

import rlhf.stages.sft as sft
from rlhf.learning.learner import Learner
from rlhf.monitor.heartbeat import dump_stacks
from rlhf.plugins import loss
from transfer.trainer.session import Session

HARM = os.environ.get("{HARM}", "")
loss("of_the_test")(lambda algo, logprobs, old, advantages, mask: (logprobs, logprobs))  # a plug-in has a part


def score(prompts, completions, **columns):
    harm, _, asleep = HARM.partition(" ")
    if harm in SAMPLING and learned() and not Path("{WHEN}").exists():
        Path("{WHEN}").write_text(str(time.time()))
        SAMPLING[harm]()
        time.sleep({ASLEEP_S} if asleep else 0)
    return [float(len(set(text))) for text in completions]


def learned():
    path = Path("run/metrics.jsonl")
    return path.exists() and "train/loss" in path.read_text()


def kill(module):
    for process in psutil.Process().children(recursive=True):
        if module in process.cmdline():
            process.kill()
            return
    raise AssertionError(f"there is no {{module}}")


SAMPLING = {{
    "kill-rank": lambda: kill("rlhf.beside"),
    "kill-worker": lambda: kill("rlhf.rollout.worker"),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda: os.killpg(0, signal.SIGINT),
}}

plain, accumulate = Learner.learn, Learner._accumulate


def learn(self, batch, rewards):
    if self.spread.ranks.number == self.spread.ranks.count - 1 and learned() and not Path("{WHEN}").exists():
        if HARM in ("learning kill", "learning raise", "learning stop"):
            Path("{WHEN}").write_text(str(time.time()))
        if HARM == "learning kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if HARM == "learning raise":
            raise ZeroDivisionError("a kernel\\nof the test")
        if HARM == "learning stop":
            os.kill(os.getpid(), signal.SIGSTOP)
    if HARM == "stacks" and self.spread.ranks.first and not Path("{WHEN}").exists():
        Path("{WHEN}").write_text(str(time.time()))
        dump_stacks(Path("run/stacks.txt"))
    return plain(self, batch, rewards)


def accumulated(self, batch, weights):
    with open(f"shares-{{self.spread.ranks.number}}", "a") as file:
        print(len(batch.ids_BT), file=file)
    return accumulate(self, batch, weights)


def pushed(self, weights):
    if HARM == "pushing kill-rank" and learned() and not Path("{WHEN}").exists():
        Path("{WHEN}").write_text(str(time.time()))
        kill("rlhf.beside")
    return push(self, weights)


def joined(rows, device):
    if HARM == "warm-up kill" and "rlhf.beside" in sys.modules["__main__"].__spec__.name:
        Path("{WHEN}").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    with open("warm-up", "a") as file:
        print(len(rows), file=file)
    return join(rows, device)


join, sft.join = sft.join, joined
push, Session.push = Session.push, pushed
Learner.learn, Learner._accumulate = learn, accumulated
'''


@dataclass
class Ended:
    """A command that has ended, with what it left."""

    code: int
    output: str
    errors: str
    seconds: float  # after the harm, if any was done
    survivors: list[str]  # command lines of processes in its folder
    shared_memory: set[str]
    lines: list[str] = field(init=False)  # of stderr, but for bars and warnings of libraries

    def __post_init__(self) -> None:
        self.lines = [line for line in self.errors.splitlines() if line.strip()]

    def assert_nothing_is_left(self) -> None:
        """No process, nothing in shared memory."""
        assert (self.survivors, self.shared_memory) == ([], set())


class Runs:
    """Commands in a folder, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "mine.py").write_text(MINE)

    def train(self, *words: str, harm: str = "", meanwhile: Callable[[], None] = lambda: None) -> Ended:
        """`python -m rlhf.train` with the small run and these overrides."""
        return self.command(["-m", "rlhf.train", *SMALL, *words], harm, meanwhile)

    def torchrun(self, count: int, *words: str) -> Ended:
        """The same by torchrun."""
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "rlhf.train"]
        return self.command([*command, *SMALL, *words])

    def resume(self, *words: str) -> Ended:
        """`python -m rlhf.resume run`."""
        return self.command(["-m", "rlhf.resume", "run", *words])

    def copied_to(self, other: Runs) -> None:
        """Let another one have the same run."""
        shutil.copytree(self.folder / "run", other.folder / "run")

    def command(self, arguments: list[str], harm: str = "", meanwhile: Callable[[], None] = lambda: None) -> Ended:
        """Python with these arguments, until it ends; `meanwhile` is called again and again."""
        before = set(os.listdir("/dev/shm"))
        (self.folder / WHEN).unlink(missing_ok=True)
        variables = {"PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)]), HARM: harm}
        with open(self.folder / "stdout", "w") as output, open(self.folder / "stderr", "w") as errors:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env=os.environ | variables,
                stdout=output,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a process group of its own, as a terminal gives it
            )
            until = time.monotonic() + RUN_S
            try:
                while (code := process.poll()) is None:
                    assert time.monotonic() < until, "it does not end"
                    meanwhile()
                    time.sleep(0.02)
            finally:
                process.kill()
        ended, when = time.time(), self.folder / WHEN
        assert when.exists() == bool(harm), "harm is done where it is meant to be, and only there"
        deadline = time.monotonic() + GONE_S
        while (survivors := living_in(self.folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        said = [(self.folder / name).read_text() for name in ("stdout", "stderr")]
        seconds = ended - float(when.read_text()) if harm else 0.0
        return Ended(code, *said, seconds, survivors, left_in_shared_memory(before, GONE_S))

    def numbers(self) -> list[dict[str, Any]]:
        """What the run measured, but for times, and bytes of messages."""
        measured = ("seconds/", "transfer/", "tokens_per_second")
        rows = [json.loads(line) for line in (self.folder / "run/metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if not key.startswith(measured)} for row in rows]

    def digests(self) -> dict[int, str]:
        """Of each version of the weights that was published."""
        told = map(json.loads, (self.folder / "run/journal/trainer.jsonl").read_text().splitlines())
        return {each["version"]: each["digest"] for each in told if each["op"] == "publish"}

    def shares(self) -> list[int]:
        """How many micro-batches each rank has had."""
        files = sorted(self.folder.glob("shares-*"))
        return [len(path.read_text().splitlines()) for path in files]

    def of_warm_up(self) -> list[int]:
        """The rows of each micro-batch of the warm-up, of all ranks."""
        return list(map(int, (self.folder / "warm-up").read_text().split()))
