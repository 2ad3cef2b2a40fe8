"""Plays one case: a trainer and workers, of which one after the other is killed, while all that is served is read."""

from __future__ import annotations

import json
import os
import secrets
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, Protocol

import psutil

from tests.faults import content
from tests.faults.cases import Case
from tests.faults.ledger import Ledger
from tests.faults.mischief import INIT, UPDATE
from tests.faults.readers import Ask, Reader
from tests.faults.trainer import Orders, train
from tests.faults.worker import FORKS
from tests.history import check
from transfer import make_transfer
from transfer.agreement.manifest import Manifest
from transfer.worker.plain_worker import PlainSpec

HEALED_S = 40.0  # deadline for the next whole push after a kill
TRAPPED_S = 0.3  # deadline for a step of the protocol to come
SETTLED_S = 5.0  # deadline for what a kill has cut to be closed on the other side, too
LATE_S = 1.0  # for messages that are still on their way when the trainer is gone
SPARE = 3  # descriptors by which two moments of a process may differ
SAMPLES = 3  # of them, the first and the last, are compared by their least
SOCKET = "\0transfer-"
MOMENTS = {"intend": "kills while a version is written", "publish": "kills while workers take a version"}


class Broken(Exception):
    """Something that must hold does not: which of the zeros is none, and what happened."""

    def __init__(self, zero: str, text: str) -> None:
        super().__init__(text)
        self.zero = zero


class Workers(AbstractContextManager["Workers"], Protocol):
    """The workers of a case."""

    overlap: float  # how often a kill does not wait until the one before is healed

    def orders(self) -> dict[str, object]: ...  # what a trainer is told about them: fields of Orders
    def pid(self, index: int) -> int: ...
    def ask(self, index: int) -> Ask: ...
    def killed(self, index: int, pid: int, away_s: float) -> None: ...  # sees to it that it is started again
    def trap(self, step: str, answered: bool, pid: int, strike: Callable[[], None], trainer: Connection) -> None: ...
    def counts(self) -> Counter[str]: ...


class Stage:
    """One case, from the first start to the last check."""

    overlap: float | None = None  # as the workers say

    def __init__(self, case: Case, folder: Path, seed: int, planted: str, stops: bool = False) -> None:
        self.case, self._folder, self._planted, self._stops = case, folder, planted, stops
        self.counts: Counter[str] = Counter()
        self._random = Random(seed)
        self._ledger = Ledger(folder, case.size)
        self._stack = ExitStack()
        self._readers: list[Reader] = []
        self._number = 0  # of the trainer
        self._ranks: list[Any] = []  # its processes
        self._struck = 0.0  # when the last victim was there again
        self._descriptors: dict[int, list[int]] = defaultdict(list)  # by process
        self._seen: dict[int, psutil.Process] = {}
        with make_transfer(case.config, folder) as transfer:
            self._endpoint = dict(transfer.endpoint)
        if case.ranks > 1 and "socket" in self._endpoint:
            others = [f"{SOCKET}{secrets.token_hex(16)}" for _ in range(1, case.ranks)]
            self._endpoint["sockets"] = [self._endpoint["socket"], *others]

    def specs(self, token: str) -> list[PlainSpec]:
        """What the workers are built from."""
        manifest = Manifest.of(content.zeros(self.case.size)).to_json()
        journals = [str(self._folder / "journal" / f"worker-{index}.jsonl") for index in range(self.case.workers)]
        return [PlainSpec(manifest=manifest, endpoint=self._endpoint, token=token, journal=j) for j in journals]

    def open(self, workers: Workers) -> None:
        """Start everybody, and wait for the first push."""
        self._workers = self._stack.enter_context(workers)
        self._readers = [Reader(index, workers.ask(index)) for index in range(self.case.workers)]
        for reader in self._readers:
            reader.start()
            self._stack.callback(reader.close)
        self._start_trainer()
        self._stack.callback(self._end_trainer)
        self._await_push()

    def disturb(self) -> None:
        """Kill somebody, start it again, and look at all that was served meanwhile."""
        if self._random.random() >= (self._workers.overlap if self.overlap is None else self.overlap):
            self._await_push(self._random.choice([1, 1, 2, 5]))
            self._sample()
        self.counts["kills"] += 1
        self.counts["kills and stops"] += 1
        self._kill_somebody()
        self._struck = time.monotonic()
        self.look()

    def _kill_somebody(self) -> None:
        if self._random.random() < 0.45:
            self.counts["kills of the trainer"] += 1
            self._strike(self._pid())
            self._replace_trainer()
        else:
            self.counts["kills of a worker"] += 1
            self._kill_worker()

    def _kill_worker(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Kill one and, after what is done meanwhile, start it again."""
        index = self._random.randrange(self.case.workers)
        pid = self._workers.pid(index)
        self._strike(pid)
        meanwhile()
        self._workers.killed(index, pid, self._random.choice([0.0, 0.0, 0.01, 0.05, 0.3]))

    def look(self) -> None:
        """Broken, if anything that was served, or that a trainer saw, was wrong."""
        self._ledger.follow()
        wrong = [("error", text) for reader in self._readers for text in reader.wrong]
        if (told := self._folder / "wrong.jsonl").exists():
            wrong += [tuple(json.loads(line)) for line in told.read_text().splitlines()]
        for reader in self._readers:
            wrong += filter(None, map(self._ledger.verdict, reader.taken()))
        if wrong:
            raise Broken(wrong[0][0], "\n    ".join(text for _, text in wrong[:5]))

    def close(self) -> None:
        """The last checks, while the survivors live, then everybody's end, then the history."""
        try:
            self._await_push()
            self._sample()
            self._check_survivors()
        finally:
            self._stack.close()
        self.look()
        try:
            self.counts += Counter({f"journal: {op}": n for op, n in check(self._folder / "journal").items()})
        except AssertionError as error:
            raise Broken("history", str(error)) from None
        if late := psutil.wait_procs(self._seen.values(), timeout=SETTLED_S)[1]:
            raise Broken("left behind", str(late))

    def abandon(self) -> Counter[str]:
        """End everybody, whatever is wrong; what was counted."""
        self._stack.close()
        for reader in self._readers:
            self.counts += Counter({f"reads {kind}": number for kind, number in reader.counts.items()})
        if self._readers:
            self.counts += self._workers.counts()
        self.counts["started over"] += self._ledger.started_over
        self.counts["opened again"] += self._ledger.opened_again
        self.counts["processes started"] += len(self._seen)
        return self.counts

    # --- the trainer --------------------------------------------------------------------------------------------------

    def _start_trainer(self) -> None:
        orders = Orders(
            case=self.case,
            folder=self._folder,
            number=self._number,
            seed=self._random.getrandbits(32),
            socket=str(self._endpoint.get("socket", "")).removeprefix(SOCKET),
            planted=self._planted,
            stops=self._stops,
            **self._workers.orders(),  # type: ignore[arg-type]
        )
        self._number += 1
        self.counts["trainers started"] += 1
        self._commands, theirs = FORKS.Pipe()
        self._ranks = self._started(orders, theirs)
        theirs.close()
        for rank in range(self.case.ranks):
            self._remember(self._pid(rank))

    def _started(self, orders: Orders, harness: Connection) -> list[Any]:
        """The trainer's processes."""
        process = FORKS.Process(target=train, args=(orders, harness), daemon=True)
        process.start()
        return [process]

    def _replace_trainer(self) -> None:
        """Start another one, after the end of one that was killed."""
        self._end_trainer()
        if self._random.random() < 0.02:
            self._check_lease()
        time.sleep(self._random.choice([0.0, 0.0, 0.01, 0.05]))
        self._start_trainer()

    def _end_trainer(self) -> None:
        for process in self._ranks:
            process.kill()
            process.join(SETTLED_S)
            if process.exitcode is None:
                raise Broken("left behind", "the trainer has outlived its kill")
            process.close()
        self._ranks = []
        self._commands.close()

    def _pid(self, rank: int = 0) -> int:
        """The trainer's process, or that of one of its ranks."""
        return self._ranks[rank].pid

    def _await_push(self, count: int = 1) -> None:
        """Until all workers hold a version that was pushed after the last kill; so often."""
        deadline, seen = time.monotonic() + HEALED_S, self._struck
        while count:
            if self._ledger.pushed["t"] > seen and self._ledger.pushed["trainer"] == self._number - 1:
                seen = self._ledger.pushed["t"]
                count -= 1
                continue
            if time.monotonic() > deadline:
                raise Broken(
                    "stuck", f"no push within {HEALED_S:g} s after a kill; the last event: {self._ledger.last}"
                )
            if not all(process.is_alive() for process in self._ranks):
                self.look()
                raise Broken("error", "the trainer has died by itself")
            time.sleep(0.001)
            self._ledger.follow()

    # --- the kill -----------------------------------------------------------------------------------------------------

    def _strike(self, pid: int) -> None:
        """Kill the process at a step of the protocol, or soon."""
        self._remember(pid)
        over = threading.Event()  # a trap may outlive the process, and its number

        def strike() -> None:
            with suppress(ProcessLookupError):
                if not over.is_set():
                    os.kill(pid, signal.SIGKILL)

        if self._random.random() < 0.5:
            step = self._random.choice(UPDATE if self._random.random() < 0.9 else [INIT])
            self._workers.trap(step, self._random.random() < 0.5, pid, strike, self._commands)
            self.counts["kills at a step of the protocol"] += ended(pid, TRAPPED_S)
        else:
            time.sleep(self._random.uniform(0, 0.03))
        strike()
        over.set()
        self._note_moment()

    def _note_moment(self) -> None:
        self._ledger.follow()
        self.counts[MOMENTS.get(self._ledger.last["op"], "kills between updates")] += 1

    def _check_lease(self) -> None:
        """What a dead trainer has staged is dropped after its lease."""
        time.sleep(self.case.lease_s + LATE_S)
        for index in range(self.case.workers):
            self._workers.pid(index)  # is there
            with closing(self._workers.ask(index)) as ask:
                status = ask("status")
            if status is None or status["target"] is not None:
                raise Broken("lease", f"worker {index} stages for a trainer that is gone: {status}")
            self.counts["leases seen to end"] += 1

    # --- what must not grow -------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        ours = map(self._pid, range(self.case.ranks))
        for pid in [*ours, *map(self._workers.pid, range(self.case.workers))]:
            self._remember(pid)
            self._watch(pid, self._descriptors[pid])

    def _watch(self, pid: int, counts: list[int]) -> None:
        """Broken, if the process has ever more descriptors, and does not close them soon."""
        process = self._seen[pid]
        counts.append(process.num_fds())
        most = min(counts[:SAMPLES]) + SPARE
        if len(counts) >= 2 * SAMPLES and min(counts[-SAMPLES:]) > most:
            _settled(lambda: process.num_fds() <= most, lambda: f"process {pid} has ever more descriptors: {counts}")
            counts[-1] = process.num_fds()

    def _remember(self, pid: int) -> None:
        if pid not in self._seen:
            with suppress(psutil.NoSuchProcess):  # it has killed itself as soon as it was there
                self._seen[pid] = psutil.Process(pid)

    def _check_survivors(self) -> None:
        for pid in map(self._workers.pid, range(self.case.workers)):
            _settled(
                lambda pid=pid: _mappings(pid) <= self.case.ranks, lambda pid=pid: f"{_mappings(pid)} arenas are mapped"
            )
        self.counts["processes watched"] += sum(len(counts) >= 2 * SAMPLES for counts in self._descriptors.values())


def _settled(holds: Callable[[], bool], wrong: Callable[[], str]) -> None:
    deadline = time.monotonic() + SETTLED_S
    while not holds():
        if time.monotonic() > deadline:
            raise Broken("descriptors", wrong())
        time.sleep(0.01)


def ended(pid: int, within_s: float) -> bool:
    """Whether the process ends within this time."""
    deadline = time.monotonic() + within_s
    while psutil.pid_exists(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def _mappings(pid: int) -> int:
    """How many arenas a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text().count("/memfd:transfer")
