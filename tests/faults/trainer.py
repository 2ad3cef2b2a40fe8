"""The trainer: pushes one content after the other, and looks now and then at what the workers make of it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from tests.faults import content, moments, sabotage
from tests.faults.cases import Case
from transfer import Sender, Transfer, make_transfer
from transfer.agreement.journal import Journal
from transfer.agreement.wire import RemoteError, TransferError
from transfer.memory import descriptors
from transfer.trainer.senders.http import HttpSender

if TYPE_CHECKING:
    from tests.faults.ranks import Seat, Talk

AGAIN_S = 0.005
REPLACED = "another trainer has taken over these workers"  # an error of the session's
UP_S = 5.0  # deadline for a worker that was killed to be there again


@dataclass(frozen=True)
class Orders:
    """What one start of the trainer is told."""

    case: Case
    folder: Path
    number: int  # how many trainers were started before
    seed: int
    workers: tuple[str, ...]  # their URLs, or their actors' names
    socket: str  # of this rank
    token: str = ""
    ray: str = ""  # the cluster's address
    planted: str = ""
    stops: bool = False  # whether it is to be stopped at moments of an update


class Publications(Journal):
    """The trainer's journal, which also tells from what the content of a version follows."""

    def __init__(self, path: Path | None, trainer: int) -> None:
        super().__init__(path)
        self.push = {"trainer": trainer, "push": 0}

    def write(self, op: str, **fields: Any) -> None:
        super().write(op, **fields, **self.push)


class Commands:
    """What the harness wants killed at a step of the protocol; without a harness, this process ends.

    A command is `(until when, step, answered, pid)`; the pid may be this process's own.
    """

    def __init__(self, harness: Connection) -> None:
        self._harness = harness
        self._trap: tuple[float, str, bool, int] | None = None
        self._lock = threading.Lock()  # each worker is told by a thread of its own
        threading.Thread(target=self._listen, daemon=True).start()

    def reached(self, step: str, answered: bool) -> None:
        """Kill, if that is what was waited for."""
        with self._lock:
            if self._trap is not None and self._trap[1:3] == (step, answered):
                until, *_, pid = self._trap
                self._trap = None
                with suppress(ProcessLookupError):
                    if time.monotonic() < until:
                        os.kill(pid, signal.SIGKILL)

    def _listen(self) -> None:
        try:
            while True:
                self._trap = self._harness.recv()
        except (OSError, EOFError):
            os._exit(1)


def train(orders: Orders, harness: Connection, seat: Seat | None = None) -> None:
    """The trainer's process, or that of a rank of it with this seat.

    It ends when it is killed, or another rank is, or when something goes wrong that must not.
    """
    commands = Commands(harness)
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    sabotage.plant(orders.planted)
    if orders.stops:
        moments.in_trainer(orders.folder, sender_kind(orders))
    # workers outlive their trainers here: the next one must listen where they were told to ask
    descriptors.secrets = SimpleNamespace(token_hex=lambda _: orders.socket)  # type: ignore[assignment]
    try:
        if seat is None:
            push_for_ever(orders, commands)
        else:
            train_with_others(orders, commands, seat)
    except SystemExit:  # of a rank, in order
        raise
    except BaseException:
        report(orders.folder, "error", traceback.format_exc())
        raise


def train_with_others(orders: Orders, commands: Commands, seat: Seat) -> None:
    """As one rank of several; its exit code is LOST if another one is gone."""
    from tests.faults.ranks import LOST, Lost, met

    moments.in_rank(orders.folder, seat.number, sender_kind(orders)).reached("started")
    try:
        with met(seat, orders.folder) as talk:
            push_for_ever(orders, commands, talk)
    except Lost:
        sys.exit(LOST)


def push_for_ever(orders: Orders, commands: Commands, talk: Talk | None = None) -> None:
    """Make a transfer, whose journal and senders are the first rank's, and push."""
    first = talk is None or talk.number == 0
    journal = Publications(orders.folder / "journal" / "trainer.jsonl" if first else None, orders.number)
    with make_transfer(orders.case.config, orders.folder, orders.case.in_flight, journal, talk) as transfer:
        Trainer(orders, transfer, journal, senders(orders, commands) if first else [], talk).run()


class Trainer:
    """Pushes until it is killed."""

    def __init__(
        self,
        orders: Orders,
        transfer: Transfer,
        journal: Publications,
        senders: Sequence[Sender],
        talk: Talk | None = None,
    ) -> None:
        self._folder, self._number = orders.folder, orders.number
        self._transfer, self._journal, self._senders, self._talk = transfer, journal, senders, talk
        self._weights = content.zeros(orders.case.size)
        self._sent = self._weights if talk is None else talk.shards(self._weights)
        self._random = Random(orders.seed)
        self._replaced = False  # by what a trainer that is dead had said to a worker which did not take it then

    def run(self) -> None:
        """Open the transfer, and push for ever."""
        self._open()
        for push in itertools.count():
            while not self._tried(self._transfer.withdraw):
                pass
            content.fill(self._weights, self._number, push)
            self._journal.push["push"] = push
            self._journal.write("intend")
            pushed = self._tried(self._transfer.push, self._sent)
            if not pushed:
                if self._replaced:
                    self._open()
                continue
            if self._random.random() < 0.3:
                for sender in self._senders:
                    self._look(sender, pushed[0])
            time.sleep(self._random.choice([0.0, 0.001, 0.004]))

    def _open(self) -> None:
        while not self._tried(self._transfer.open, self._sent, self._senders):
            pass

    def _tried(self, verb: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What it gives, in a list; nothing if it fails, and may be tried again: the ranks still have each other."""
        try:
            return [verb(*arguments)]
        except TransferError as error:
            if self._talk is not None and self._talk.lost:
                raise
            self._replaced = self._talk is not None and REPLACED in str(error)
            self._journal.write("missed", error=str(error))
            time.sleep(AGAIN_S)
            return []

    def _look(self, sender: Sender, version: int) -> None:
        """What was acknowledged is what is served, also by a worker that was started again since."""
        with suppress(RemoteError, TransferError):
            try:
                seen = sender.call("completions", {})
            except RemoteError:
                if not self._transfer.recover(sender):
                    return
                seen = sender.call("completions", {})
            expected = {"version": version, "digest": content.digest(self._weights)}
            if seen != expected:
                report(self._folder, "stale", f"{sender.name} serves {seen} right after the push of {expected}")


def report(folder: Path, zero: str, text: str) -> None:
    """Tell the harness, by one write, which no kill tears."""
    with (folder / "wrong.jsonl").open("a") as file:
        file.write(json.dumps([zero, text]) + "\n")


def sender_kind(orders: Orders) -> type[Sender]:
    """What carries its messages."""
    if not orders.ray:
        return HttpSender
    from transfer.trainer.senders.ray import RaySender

    return RaySender


def senders(orders: Orders, commands: Commands) -> list[Sender]:
    """One to each worker."""
    config = orders.case.config.sender
    if not orders.ray:
        urls = enumerate(orders.workers)
        back = (lambda url: None) if orders.stops else (lambda url: lambda: up(url))  # nobody who was stopped is dead
        return [HttpSender(u, orders.token, f"worker {i}", config.timeout_s, back(u)) for i, u in urls]
    import ray

    from tests.faults.actors import NAMESPACE, BadRaySender

    ray.init(orders.ray, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.CRITICAL)
    return [BadRaySender(orders, name, commands) for name in orders.workers]


def up(url: str) -> str | None:
    """The worker's URL, which stays the same, once it answers; None if it does not."""
    import requests

    deadline = time.monotonic() + UP_S
    while time.monotonic() < deadline:
        with suppress(requests.RequestException), requests.Session() as session:
            session.trust_env = False
            session.get(f"{url}/health", timeout=UP_S)
            return url
        time.sleep(AGAIN_S)
    return None
