"""`python -m tests.faults --kills 1000`: kill trainers and workers at random moments, and count what must be zero.

With `--ranks` a trainer is several processes with sharded weights, of which any is killed; the others must end by
themselves. With `--stops 500` they are stopped (SIGSTOP) and go on (SIGCONT) instead, in every way that weights travel.

A line every 2 s tells how far it is; the table at the end shows each zero beside what it was counted over. The first
thing that is wrong ends it with exit code 1, and its folder with the journals stays.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes started

from tests.faults.cases import CASES, RANKS, STOPS, Case
from tests.faults.harness import Broken, Stage, Workers
from tests.faults.sabotage import PLANTED
from tests.faults.stops import StoppingStage
from tests.shared_memory import left_in_shared_memory

libc = ctypes.CDLL(None)
ROOT = Path(__file__).resolve().parents[2]
EVERY_S = 2.0
GONE_S = 10.0  # for what is used for a moment
PR_SET_PDEATHSIG = 1  # linux/prctl.h
CLONE_NEWNS = 0x20000  # linux/sched.h
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 0x4000, 1 << 18  # linux/mount.h

Made = Callable[[Stage, Path, Random], Workers]
SHOWN = ("kills ", "stops ", "survivors ", "messages", "journal: ", "reads ")  # by how their names begin
ZEROS = {  # what must be zero, and over what it is counted
    "torn or mislabelled": ("answers read", "reads answered"),
    "stale": ("completions in journals", "journal: serve"),
    "history": ("versions applied", "journal: finish"),
    "stuck": ("pushes acknowledged", "journal: pushed"),
    "lease": ("leases seen to end", "leases seen to end"),
    "descriptors": ("processes watched", "processes watched"),
    "left behind": ("processes started", "processes started"),
    "left in /dev/shm": ("kills and stops", "kills and stops"),
    "error": ("trainers started", "trainers started"),
}


def main() -> int:
    """The exit code."""
    arguments = parsed()
    faulthandler.dump_traceback_later(arguments.limit, exit=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is ended that was started
    if arguments.result:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    began = time.monotonic()
    alone = has_shared_memory_alone()
    shared_before = set(os.listdir("/dev/shm"))
    if arguments.over == "both":
        counts, wrong = both(arguments)
    else:
        game = Game(arguments)
        game.play()
        counts, wrong = game.counts, game.wrong
    wrong += [["left in /dev/shm", name] for name in left_in_shared_memory(shared_before, GONE_S, alone)]
    if arguments.result:
        arguments.result.write_text(json.dumps([counts, wrong]))
    else:
        print(table(arguments, counts, wrong, time.monotonic() - began))
    return 1 if wrong else 0


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--stops", type=int, default=0, help="so many stops in place of kills")
    parser.add_argument(
        "--ranks", action="store_true", help="trainers of 2 and 3 ranks, of which any is killed; over http"
    )
    parser.add_argument("--over", choices=["http", "ray", "both"], default="both", help="both: a sixteenth over Ray")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", default="", help="only cases with this in their name, such as 'view'")
    parser.add_argument("--plant", default="", choices=["", *PLANTED], help="a fault that must be found")
    parser.add_argument("--round", type=int, help="kills (25) or stops (12) before all are ended, the history checked")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds, after which all stacks are printed")
    parser.add_argument("--folder", type=Path, help="where the journals are; without one, among temporary files")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # of one half of "both"
    arguments = parser.parse_args()
    if arguments.ranks:
        if arguments.stops or arguments.over == "ray":
            parser.error("--ranks is for kills, over http")
        arguments.over = "http"
    arguments.number = arguments.stops or arguments.kills
    arguments.what = "stops" if arguments.stops else "kills"
    arguments.round = arguments.round or (12 if arguments.stops else 25)
    if min(arguments.number, arguments.round) < 1:
        parser.error(f"there must be at least one of the {arguments.what}, in all and in a round")
    if arguments.over == "both" and (arguments.case or arguments.plant):
        parser.error("--case and --plant are for --over http or --over ray")
    return arguments


def both(arguments: argparse.Namespace) -> tuple[Counter[str], list[list[str]]]:
    """The kills over HTTP and those over Ray, each in a process of its own, at the same time."""
    ray = max(1, arguments.number // 16)
    counts: Counter[str] = Counter()
    wrong: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        halves = []
        for over, number in (("http", arguments.number - ray), ("ray", ray)):
            result = Path(folder) / over
            command = [sys.executable, "-m", "tests.faults", "--over", over]
            command += [f"--{arguments.what}", str(number), "--result"]
            command += [str(result), "--seed", str(arguments.seed), "--limit", str(arguments.limit)]
            command += ["--round", str(arguments.round)]
            command += ["--folder", str(arguments.folder)] if arguments.folder else []
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)  # Ray prints what died
            stack.callback(process.wait, GONE_S)
            stack.callback(process.terminate)
            halves.append((over, process, result))
        for over, process, result in halves:
            process.wait(arguments.limit)
            half = json.loads(result.read_text()) if result.exists() else [{}, [["error", f"{over} has no result"]]]
            counts += Counter(half[0])
            wrong += half[1]
    return counts, wrong


class Game:
    """Case after case, until all kills are done or something is wrong."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[list[str]] = []  # which zero, and what
        self._arguments = arguments
        self._done = 0
        self._began = self._said = time.monotonic()

    def play(self) -> None:
        """Play until the end."""
        ways = STOPS if self._arguments.stops else RANKS if self._arguments.ranks else CASES
        cases = [case for case in ways[self._arguments.over] if self._arguments.case in case.name]
        if not cases:
            raise SystemExit(f"no case over {self._arguments.over} has {self._arguments.case!r} in its name")
        with self._company() as made:
            rounds = range(-(-self._arguments.number // self._arguments.round))
            for number in rounds:
                self._round(number, cases[number % len(cases)], made)
                if self.wrong:
                    return

    def _company(self) -> AbstractContextManager[Made]:
        if self._arguments.over == "ray":
            from tests.faults.actors import ray_company

            return ray_company(self._arguments.plant, bool(self._arguments.stops))
        from tests.faults.worker import http_company

        return http_company(self._arguments.plant, bool(self._arguments.stops), self._arguments.ranks)

    def _kind(self) -> type[Stage]:
        if self._arguments.ranks:
            from tests.faults.rank_kills import RanksStage

            return RanksStage
        return StoppingStage if self._arguments.stops else Stage

    def _round(self, number: int, case: Case, made: Made) -> None:
        folder = Path(tempfile.mkdtemp(prefix=f"faults-{self._arguments.over}-{number}-", dir=self._arguments.folder))
        random = Random(f"{self._arguments.seed} {self._arguments.over} {number}")
        stops = bool(self._arguments.stops)
        stage = self._kind()(case, folder, random.getrandbits(32), self._arguments.plant, stops)
        try:
            stage.open(made(stage, folder, random))
            for _ in range(min(self._arguments.round, self._arguments.number - number * self._arguments.round)):
                stage.disturb()
                self._done += 1
                self._say(case)
            stage.close()
        except (Broken, AssertionError) as error:
            where = f"in round {number} over {self._arguments.over}, {case.name}; its journals: {folder}"
            self.wrong.append([getattr(error, "zero", "error"), f"{error}\n    {where}"])
        finally:
            self.counts += stage.abandon()
        if not self.wrong:
            shutil.rmtree(folder)

    def _say(self, case: Case) -> None:
        now = time.monotonic()
        if now - self._said >= EVERY_S:
            self._said = now
            rate = self._done / (now - self._began)
            print(
                f"{now - self._began:5.0f} s: {self._done} of {self._arguments.number} {self._arguments.what} over "
                f"{self._arguments.over}, {rate:.1f}/s; now: {case.name}",
                file=sys.stderr,
                flush=True,
            )


def has_shared_memory_alone() -> bool:
    """Give this process, and all that it starts, a /dev/shm of their own; False where the kernel does not let us."""
    return (
        libc.unshare(CLONE_NEWNS) == 0
        and libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        and libc.mount(b"shm", b"/dev/shm", b"tmpfs", MS_NOSUID | MS_NODEV, None) == 0
    )


def table(arguments: argparse.Namespace, counts: Counter[str], wrong: list[list[str]], seconds: float) -> str:
    """What was counted, and the zeros beside it."""
    how = {"kills": "kill -9", "stops": "SIGSTOP, SIGCONT"}[arguments.what]
    done = f"{counts[arguments.what]:,} of {arguments.number:,} {arguments.what}"
    lines = [f"{done} ({how}) in {seconds:.0f} s, seed {arguments.seed}", ""]
    shown = [name for name in sorted(counts) if name.startswith(SHOWN)]
    lines += [f"  {name:34}{counts[name]:>9,}" for name in [*shown, "started over", "opened again"]]
    found = Counter(zero for zero, _ in wrong)
    lines += ["", "  counted over                          N  must be zero"]
    for zero, (name, key) in ZEROS.items():
        lines.append(f"  {name:28}{counts[key]:>11,}  {zero:22}{found[zero]:>4}")
    return "\n".join([*lines, *(f"\n{zero}: {text}" for zero, text in wrong)])


if __name__ == "__main__":
    sys.exit(main())
