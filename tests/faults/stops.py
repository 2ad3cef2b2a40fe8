"""Plays a case in which one after the other is stopped (SIGSTOP), for any time, and goes on (SIGCONT)."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from functools import partial

import psutil

from tests.faults import moments
from tests.faults.harness import TRAPPED_S, Stage

QUESTIONS = 3  # that a trainer asks after a failure, each with a deadline, before it goes on
TWO = 0.2  # how often a second process is stopped at the same time


class StoppingStage(Stage):
    """Nobody dies; who is stopped finds the others further on, or its own lease at its end."""

    def disturb(self) -> None:
        """Stop one process or two, let them go on, and look at all that was served meanwhile."""
        if self._random.random() >= self._workers.overlap:
            self._await_push(self._random.choice([1, 1, 2]))
        names = ["trainer", *(f"worker-{index}" for index in range(self.case.workers))]
        weights = [self.case.workers, *[1] * self.case.workers]
        victims = {self._random.choices(names, weights)[0] for _ in range(1 + (self._random.random() < TWO))}
        stopped = []
        try:
            for who in victims:
                stopped.append(self._stop(who))
            time.sleep(self._pause_s())
        finally:
            for pid in stopped:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        self.counts["stops"] += 1
        self.counts["kills and stops"] += 1
        self._struck = time.monotonic()
        self.look()

    def _pause_s(self) -> float:
        """For a moment, until about the deadline of a message, or beyond that of a whole update and its lease."""
        deadline = self.case.config.sender.timeout_s
        kind = self._random.choices(["a moment", "about a deadline", "beyond the lease"], [30, 15, 55])[0]
        self.counts[f"stops for {kind}"] += 1
        match kind:
            case "a moment":
                return self._random.uniform(0, 0.05)
            case "about a deadline":
                return deadline * self._random.uniform(0.8, 1.3)
        messages = 3 if self.case.workers == 1 else 2  # whose deadlines are one
        return deadline * (messages + QUESTIONS + self._random.uniform(0.1, 1.0))

    def _stop(self, who: str) -> int:
        """Stop it at a moment of an update, or where it is; its process."""
        trainer = who == "trainer"
        pid = self._pid() if trainer else self._workers.pid(int(who.removeprefix("worker-")))
        self._remember(pid)
        side = "the trainer" if trainer else "a worker"
        self.counts[f"stops of {side}"] += 1
        if self._random.random() < 0.8:
            of_side = moments.of_trainer if trainer else moments.of_worker
            moment = self._random.choice(of_side(self.case.config))
            if self._stopped_itself(who, pid, moment):
                self.counts[f"stops of {side} at: {moment}"] += 1
                return pid
        else:
            time.sleep(self._random.uniform(0, 0.03))
        os.kill(pid, signal.SIGSTOP)
        return pid

    def _stopped_itself(self, who: str, pid: int, moment: str) -> bool:
        """Whether it came to this moment in time; else it will not stop there any more."""
        is_stopped = partial(_is, self._seen[pid], psutil.STATUS_STOPPED)
        moments.ask(self._folder, who, moment)
        return moments.came(self._folder, who, TRAPPED_S) and moments.within(TRAPPED_S, is_stopped)


def _is(process: psutil.Process, status: str) -> bool:
    return process.status() == status
