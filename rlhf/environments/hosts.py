"""Processes with instances of a user's class (host.py), and calls of them; whatever befalls them is an answer, too.

A process whose instance has not answered in time gets no further rows, and is killed once its other rows are over: no
thread in it can be ended. One that has died is replaced when the next row wants a place.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe
from queue import SimpleQueue
from typing import Any

from rlhf.types import DIED, RAISED
from transfer.worker.process import python_path

START_S = 60.0  # until a process has imported the user's module
END_S = 2.0  # for instances to close, when all ends


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call."""

    value: Any = None
    failed: str = ""  # the class of failure
    why: str = ""


Heard = Callable[[Outcome], None]
Named = tuple[str | None, tuple[str, ...]]  # a class, and functions beside its methods, as package.module:name


class Process:
    """One process; a thread tells it what is asked, which may not listen, and another hears what it answers."""

    def __init__(self, named: Named, calls: int) -> None:
        """ValueError if the user's module cannot be imported there, or not in time."""
        self._guard = threading.Lock()
        self._numbers = itertools.count(1)
        self._asked: dict[int, Heard] = {}
        self.rows = 0
        self.stuck = self.died = False
        self._to_send: SimpleQueue[bytes | None] = SimpleQueue()  # None: nothing further
        self._threads: list[threading.Thread] = []
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlhf.environments.host", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for whoever asks
                env={**os.environ, "PYTHONPATH": python_path()},
            )
        try:
            self._begin(named, calls)
        except BaseException:
            self.kill()
            raise
        self._threads = [
            threading.Thread(target=told, name="environments", daemon=True) for told in (self._hear, self._send)
        ]
        for thread in self._threads:
            thread.start()

    def _begin(self, named: Named, calls: int) -> None:
        try:
            self._pipe.send((named, sys.path, calls, os.getpid()))
            _, error, _ = json.loads(self._pipe.recv_bytes()) if self._pipe.poll(START_S) else (0, "", None)
        except (EOFError, OSError):
            error = "its process has ended"
        if error == "":
            raise ValueError(f"{_shown(named)}: its module has not been imported within {START_S:g} s")
        if error is not None:
            raise ValueError(f"{_shown(named)} cannot be had in a process of its own: {error}")

    def ask(self, row: int, verb: str, name: str, arguments: dict[str, Any], heard: Heard) -> None:
        """Ask for one thing; `heard` is told, from another thread or at once."""
        number = next(self._numbers)
        try:
            asked = pickle.dumps((number, row, verb, name, pickle.dumps(arguments)))
        except Exception as error:  # what cannot be pickled
            heard(Outcome(failed=RAISED, why=f"{type(error).__name__}: {error}"))
            return
        with self._guard:
            died = self.died
            if not died:
                self._asked[number] = heard
        if died:
            heard(Outcome(failed=DIED, why=self._ended()))
            return
        self._to_send.put(asked)

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._to_send.put(None)
        for thread in self._threads:
            thread.join(END_S)  # which finds the pipe's end
        self._pipe.close()

    def end(self) -> None:
        """Let its instances close for a moment, then end it."""
        with self._guard:
            asked = bool(self._asked)
        if not asked and not self.died:
            closed = threading.Event()
            self.ask(-1, "drop", "", {}, lambda _: closed.set())
            closed.wait(END_S)
        self.kill()

    def _send(self) -> None:
        try:
            while (asked := self._to_send.get()) is not None:
                self._pipe.send_bytes(asked)
        except OSError:
            self._lost()

    def _hear(self) -> None:
        try:
            while True:
                number, error, value = json.loads(self._pipe.recv_bytes())
                with self._guard:
                    heard = self._asked.pop(number, None)
                if heard is not None:
                    heard(Outcome(value) if error is None else Outcome(failed=RAISED, why=error))
        except Exception:  # the pipe's end, or what is no answer
            self._lost()

    def _lost(self) -> None:
        """It has died: so have all calls."""
        with self._guard:
            self.died = True
            asked, self._asked = list(self._asked.values()), {}
        why = self._ended() if asked else ""
        for heard in asked:
            heard(Outcome(failed=DIED, why=why))

    def _ended(self) -> str:
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            code = None
        return "its process has ended" + (f" with code {code}" if code is not None else "")


@dataclass(slots=True, eq=False)
class Seat:
    """One row's instance, in a process that may be shared; `close` in any case."""

    hosts: Hosts
    process: Process
    row: int
    waits: bool = False  # for an answer
    closed: bool = False

    def make(self, name: str, arguments: dict[str, Any], heard: Heard) -> None:
        """Make the instance, and call a method of it; "": none."""
        self._ask("make", name, arguments, heard)

    def call(self, name: str, arguments: dict[str, Any], heard: Heard) -> None:
        """Call a method of it."""
        self._ask("call", name, arguments, heard)

    def close(self) -> None:
        """Drop the instance; in the middle of a call its process is given up."""
        if not self.closed:
            self.closed = True
            self.hosts.leave(self)

    def _ask(self, verb: str, name: str, arguments: dict[str, Any], heard: Heard) -> None:
        self.waits = True

        def told(outcome: Outcome) -> None:
            self.waits = False
            heard(outcome)

        self.process.ask(self.row, verb, name, arguments, told)


@dataclass(slots=True)
class Hosts:
    """Up to `count` processes, each with many rows; a context that ends them all."""

    named: Named
    count: int
    calls: int  # that run at the same time in a process
    _processes: list[Process] = field(default_factory=list)
    _leaving: list[Process] = field(default_factory=list)  # with rows, but without new ones
    _numbers: Any = field(default_factory=lambda: itertools.count(1))
    _guard: threading.RLock = field(default_factory=threading.RLock)
    _starter: ThreadPoolExecutor | None = None  # the kernel ends a process with the thread that started it

    def __enter__(self) -> Hosts:
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="environments")
        return self

    def __exit__(self, *exception: object) -> None:
        with self._guard:
            processes, self._processes, self._leaving = [*self._processes, *self._leaving], [], []
        for process in processes:
            process.end()
        if self._starter is not None:
            self._starter.shutdown(wait=True, cancel_futures=True)

    def seat(self) -> Seat:
        """A place for a row, in the process with the fewest; ValueError if none can be started."""
        with self._guard:
            for process in [each for each in self._processes if each.died or each.stuck]:
                self._processes.remove(process)
                self._leaving.append(process)
                self._reap(process)
            if len(self._processes) < self.count:
                assert self._starter is not None, "within the context"
                self._processes.append(self._starter.submit(Process, self.named, self.calls).result(2 * START_S))
            process = min(self._processes, key=lambda each: each.rows)
            process.rows += 1
            return Seat(self, process, next(self._numbers))

    def leave(self, seat: Seat) -> None:
        """The row is over."""
        with self._guard:
            seat.process.rows -= 1
            seat.process.stuck |= seat.waits
            if seat.process.stuck and seat.process in self._processes:
                self._processes.remove(seat.process)
                self._leaving.append(seat.process)
            gone = seat.process in self._leaving
        if not seat.waits:
            seat.process.ask(seat.row, "drop", "", {}, _nothing)
        if gone:
            with self._guard:
                self._reap(seat.process)

    def _reap(self, process: Process) -> None:
        if (process.died or not process.rows) and process in self._leaving:
            self._leaving.remove(process)
            process.kill()


def _nothing(outcome: Outcome) -> None:
    """What became of an instance that was dropped is nobody's business."""


def _shown(named: Named) -> str:
    return ", ".join(filter(None, (named[0], *named[1])))
