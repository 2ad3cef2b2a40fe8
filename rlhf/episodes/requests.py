"""Rows that are ready go to the workers, in requests that run at the same time; each in a thread of its own.

A worker whose rows share its batch with those of other requests (`rollout.continuous`) is asked for few rows at a time,
so that none waits long for the others of its request; any other is asked for all that are ready, once it is free.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.rollout.client import RolloutClient, blocks
from rlhf.types import Completion
from transfer import Sender

MOST_REQUESTS = 48  # that run at a worker, which has 64 threads for them


@dataclass(frozen=True, slots=True)
class Asked:
    """The next answers of rows: `n` from each prompt, beginning with its sample number `first`."""

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    firsts: Sequence[int]
    n: int
    temperature: float
    measured: Sequence[int] | None  # which of the answers have log-probs; None: all
    most: int | None = None  # tokens of an answer; None: rollout.max_new_tokens
    stop: Sequence[str] = ()  # texts that end an answer, beside those of rollout.stop


Answered = Callable[[list[Completion] | BaseException], None]


class Requests:
    """The requests of one step."""

    def __init__(self, client: RolloutClient) -> None:
        self._client = client
        self._most = MOST_REQUESTS if client.continuous else 1  # that run at a worker
        self._running: Counter[Sender] = Counter()

    @property
    def running(self) -> int:
        """How many there are."""
        return self._running.total()

    def shares(self, rows: int) -> list[tuple[Sender, slice]]:
        """Which of so many rows that are ready are asked of which worker now; the others wait."""
        turns = range(self._most)  # the least busy first, one after the other
        free = [sender for turn in turns for sender in self._client.senders if self._running[sender] <= turn]
        parts = blocks(rows, min(len(free), rows)) if free and rows else []
        return list(zip(free, parts, strict=False))

    def ask(self, sender: Sender, asked: Asked, answered: Answered) -> None:
        """Ask the worker, and tell, in this thread's stead, what it has answered or why it has not."""
        self._running[sender] += 1
        threading.Thread(target=self._ask, args=(sender, asked, answered), name="episodes", daemon=True).start()

    def over(self, sender: Sender) -> None:
        """One of its requests has been told of."""
        self._running[sender] -= 1

    def _ask(self, sender: Sender, asked: Asked, answered: Answered) -> None:
        try:
            with self._client.turn_at(sender):
                client = self._client.of(sender)
                if asked.most is not None or asked.stop:
                    client = client.ending(asked.most, asked.stop)
                told: list[Completion] | BaseException = client.complete(
                    asked.prompts, asked.seeds, asked.n, asked.temperature, asked.measured, asked.firsts
                )
        except BaseException as error:  # the thread of the step raises it, or has the worker brought back
            told = error
        answered(told)
