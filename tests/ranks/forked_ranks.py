"""Ranks of a trainer for the tests: forked processes that have met as those of a run do, each with its `Ranks`."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import peft  # noqa: F401 - before processes are forked that need it, and what optimisers import
import torch
import torch._dynamo

from rlhf.ranks.meeting import _process_group
from rlhf.ranks.place import Place
from rlhf.ranks.ranks import Joined
from rlhf.ranks.star import Meeting, join

FORK = multiprocessing.get_context("fork")
DEADLINE_S = 60.0
TIMEOUT_S = 30.0  # trainer.timeout_s


class Pool:
    """So many ranks, which wait for something to do."""

    def __init__(self, pipes: list[Any], processes: list[Any]) -> None:
        self._pipes, self.processes = pipes, processes

    def call(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `work(ranks, *arguments)` gives in each rank; AssertionError with the errors, if any."""
        outcomes = self.outcomes(work, *arguments)
        assert all(kind == "gives" for kind, _ in outcomes), outcomes
        return [value for _, value in outcomes]

    def outcomes(self, work: Callable[..., Any], *arguments: Any) -> list[tuple[str, Any]]:
        """(gives, value), (raises, text) or (is gone, None) of each rank."""
        self.begin(work, *arguments)
        return [self.outcome(number) for number in range(len(self._pipes))]

    def begin(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Let all ranks do it."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((work, arguments)))

    def outcome(self, number: int) -> tuple[str, Any]:
        """What came of it there."""
        try:
            assert self._pipes[number].poll(DEADLINE_S), f"rank {number} hangs"
            kind, value = self._pipes[number].recv()
        except (EOFError, OSError):
            return "is gone", None
        return kind, value

    def kill(self, number: int, signum: int = signal.SIGKILL) -> None:
        """Now."""
        os.kill(self.processes[number].pid, signum)


@contextlib.contextmanager
def pool(count: int, timeout_s: float = TIMEOUT_S) -> Iterator[Pool]:
    """So many ranks; they end with this."""
    meeting = Meeting("127.0.0.1", "a key of the test")
    pairs = [FORK.Pipe() for _ in range(count)]
    ours = [pair[0] for pair in pairs]
    processes = [
        FORK.Process(target=_serve, args=(Place(n, count), meeting, theirs, ours, timeout_s), daemon=True)
        for n, (_, theirs) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    meeting.close()
    for _, theirs in pairs:
        theirs.close()
    try:
        made = Pool(ours, processes)
        made.call(_nothing)
        yield made
    finally:
        for pipe in ours:
            pipe.close()
        for process in processes:
            process.join(5)
            process.kill()
            process.join()


def _nothing(ranks: Joined) -> None:
    """Until here all are there, and have their process group."""


def _serve(place: Place, meeting: Meeting, pipe: Any, others: list[Any], timeout_s: float) -> None:
    for other in others:  # the test's ends
        other.close()
    torch.set_num_threads(1)
    if place.first:
        star = meeting.all(place.count, time.monotonic() + DEADLINE_S, lambda: None)
    meeting.close()
    if not place.first:
        star = join(meeting.invitation, place.number)
    ranks = Joined(place, star, "127.0.0.1", timeout_s)
    failed: BaseException | None = None
    with _process_group(ranks, torch.device("cpu")), contextlib.suppress(EOFError, OSError):
        while failed is None:
            work, arguments = pickle.loads(pipe.recv_bytes())  # noqa: S301 - the test's own
            try:
                said = "gives", work(ranks, *arguments)
            except BaseException as error:
                failed, said = error, ("raises", f"{type(error).__name__}: {error}")
            if failed is not None:
                ranks.close(failed)
            pipe.send(said)
    os._exit(0)
