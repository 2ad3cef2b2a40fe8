"""Plays a case with a trainer of several ranks, of which any is killed, or a worker, or both at once."""

from __future__ import annotations

import dataclasses
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.faults import moments
from tests.faults.harness import SETTLED_S, SOCKET, TRAPPED_S, Broken, Stage, ended
from tests.faults.ranks import LOST, WITH_THE_FIRST, seats
from tests.faults.trainer import Orders, train
from tests.faults.worker import FORKS

OPENS_S = 3.0  # for a new trainer to come to a moment of its opening
ENDED_S = 5.0  # for the other ranks to end, once one is gone
TERMS_S = (1.0, 2.0, 3.0, ENDED_S)  # in which they are counted


class RanksStage(Stage):
    """One rank is gone: the others end by themselves, and another trainer takes the workers over."""

    overlap = 0.35
    _fell = 0.0  # when a rank was killed last

    def _started(self, orders: Orders, harness: Connection) -> list[Any]:
        places = seats(self.case.ranks, self.case.by_gloo, FORKS.Pipe)
        processes = []
        for seat, socket in zip(places, self._endpoint.get("sockets", [""] * self.case.ranks), strict=True):
            own = dataclasses.replace(orders, socket=socket.removeprefix(SOCKET))
            processes.append(FORKS.Process(target=train, args=(own, harness, seat), daemon=True))
            processes[-1].start()
        for seat in places:
            seat.close()
        return processes

    def _kill_somebody(self) -> None:
        victims = self._random.choices(
            ["a rank", "a rank that opens", "a worker", "a rank and a worker"], [40, 20, 25, 15]
        )
        self.counts[f"kills of {victims[0]}"] += 1
        match victims[0]:
            case "a rank":
                self._strike_rank()
                self._replace_trainer()
            case "a rank that opens":
                self._end_trainer()
                self._strike_as_it_opens()
                self._replace_trainer()
            case "a worker":
                self._kill_worker()
            case _:
                self._kill_worker(self._strike_rank)
                self._replace_trainer()

    def _strike_rank(self) -> None:
        """Kill one at a moment of its work, or as any process is killed."""
        rank = self._random.randrange(self.case.ranks)
        if self._random.random() < 0.7:
            moment = self._random.choice(moments.of_rank(rank, self.case.config, opens=False))
            moments.ask(self._folder, f"rank-{rank}", moment)
            self._kill_at(rank, moment, TRAPPED_S)
        else:
            self._strike(self._pid(rank))
        self._note_kill(rank)

    def _strike_as_it_opens(self) -> None:
        """Start a trainer of which one rank is killed before the first push."""
        rank = self._random.randrange(self.case.ranks)
        moment = self._random.choice(moments.of_rank(rank, self.case.config, opens=True))
        moments.ask(self._folder, f"rank-{rank}", moment)
        self._start_trainer()
        self._kill_at(rank, moment, OPENS_S)
        self._note_kill(rank)

    def _kill_at(self, rank: int, moment: str, within_s: float) -> None:
        """Wait until it kills itself there; or else kill it."""
        if moments.came(self._folder, f"rank-{rank}", within_s):
            self.counts[f"kills of a rank at: {moment}"] += 1
            ended(self._pid(rank), TRAPPED_S)
        self._ranks[rank].kill()
        self._note_moment()

    def _note_kill(self, rank: int) -> None:
        self._fell = time.monotonic()
        self.counts["kills of the first rank" if rank == 0 else "kills of another rank"] += 1

    def _end_trainer(self) -> None:
        """One rank is killed, if none was; Broken unless the others end by themselves."""
        ranks, self._ranks = self._ranks, []
        try:
            if ranks and all(process.is_alive() for process in ranks):
                self._random.choice(ranks).kill()
                self._fell = time.monotonic()
            for number, process in enumerate(ranks):
                process.join(max(0.0, self._fell + ENDED_S - time.monotonic()))
                if process.exitcode is None:
                    raise Broken("left behind", f"rank {number} has outlived another one by {ENDED_S:g} s")
                self._note_end(number, process.exitcode)
        finally:
            for process in ranks:
                process.kill()
                process.join(SETTLED_S)
                process.close()
            self._commands.close()
        if left := self._sockets():
            raise Broken("left behind", f"all ranks have ended, but not their sockets {left}")

    def _note_end(self, number: int, code: int) -> None:
        if code == -signal.SIGKILL:
            return
        if code not in ((LOST,) if number == 0 else (LOST, WITH_THE_FIRST)):
            self.look()
            raise Broken("error", f"rank {number} has ended with exit code {code} as another one was gone")
        self.counts["survivors that ended " + ("in order" if code == LOST else "with the first rank")] += 1
        term = next((term for term in TERMS_S if time.monotonic() - self._fell < term), ENDED_S)
        self.counts[f"survivors that ended within {term:g} s"] += 1

    def _sockets(self) -> list[str]:
        """The trainer's, at which workers get memory, that are still there."""
        there = Path("/proc/net/unix").read_text()
        return [name for name in self._endpoint.get("sockets", []) if name.replace("\0", "@") in there]
