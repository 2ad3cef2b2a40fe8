"""Between sessions' calls, which come in threads, and the workers, which the thread of the step asks.

Calls that wait are asked together, as many of them as a worker takes at once; a worker that has died is brought back in
the step's thread, which outlives it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Any

from rlhf.episodes.requests import Asked, Requests
from rlhf.gateway.calls import Wanted
from rlhf.rollout.client import RolloutClient
from rlhf.types import Completion
from transfer import Sender
from transfer.agreement.wire import RemoteError

Call = tuple[Wanted, "Future[list[Completion]]"]


class Sampling:
    """The calls of a step."""

    def __init__(self, client: RolloutClient) -> None:
        self._client = client
        self._requests = Requests(client)
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._waiting: list[Call] = []

    def ask(self, wanted: Wanted) -> Future[list[Completion]]:
        """From any thread: let workers be asked for this."""
        future: Future[list[Completion]] = Future()
        self._events.put(partial(self._wait, (wanted, future)))
        return future

    def tell(self, event: Callable[[], None]) -> None:
        """From any thread: let this be done by the step's."""
        self._events.put(event)

    def go_on(self, wait_s: float) -> None:
        """Do what has come, within that time; RemoteError or RunError of a worker that fails."""
        try:
            self._events.get(timeout=wait_s)()
            while True:
                self._events.get_nowait()()
        except Empty:
            pass
        self._hand_out()

    def close(self) -> None:
        """Nothing is sampled any more for whoever waits."""
        for _, future in self._waiting:
            future.cancel()

    def _wait(self, call: Call) -> None:
        self._waiting.append(call)

    def _hand_out(self) -> None:
        waiting = [call for call in self._waiting if not call[1].cancelled()]
        shares = self._requests.shares(len(waiting))
        self._waiting = [] if shares else waiting
        for sender, part in shares:
            for _, calls in groupby(sorted(waiting[part], key=_kind), key=_kind):
                self._request(sender, list(calls))

    def _request(self, sender: Sender, calls: list[Call]) -> None:
        """Ask for the answers of calls of one kind, each sample as a prompt of its own."""
        samples = [(wanted, wanted.first + number) for wanted, _ in calls for number in range(wanted.n)]
        some = calls[0][0]
        asked = Asked(
            [wanted.prompt for wanted, _ in samples],
            [wanted.seed for wanted, _ in samples],
            [number for _, number in samples],
            1,
            some.temperature,
            None,
            some.most,
            some.stop,
        )

        def answered(told: list[Completion] | BaseException) -> None:
            self._events.put(partial(self._answered, sender, calls, told))

        self._requests.ask(sender, asked, answered)

    def _answered(self, sender: Sender, calls: list[Call], told: list[Completion] | BaseException) -> None:
        self._requests.over(sender)
        if isinstance(told, BaseException):
            gone = isinstance(told, RemoteError) and sender not in self._client.senders
            if not gone and not (isinstance(told, RemoteError) and self._client.recover(sender)):
                raise told
            self._waiting = [*calls, *self._waiting]
            return
        at = 0
        for wanted, future in calls:
            _tell(future, told[at : at + wanted.n])
            at += wanted.n


def _kind(call: Call) -> Any:
    """What calls of one request have in common."""
    return call[0].temperature, call[0].most, call[0].stop


def _tell(future: Future[list[Completion]], answers: list[Completion]) -> None:
    with suppress(InvalidStateError):  # nobody waits for it any more
        future.set_result(answers)
