"""Steps of an engine that any number of completions share, each in a thread of its own; no thread is added.

    with stepping.joined(turn) as part:
        version = part.ready()                          # no step is under way, and none begins before part.step()
        part.submit({name: row, ...}, hand_over)        # give the engine requests
        while part.rows and (outputs := part.step()) is not None:
            ...                                         # [(row, output)], all of weights `part.version`

The completions that run meet before each step. Each calls its own `turn`, which tells the version of the weights, and
may wait while new ones come in. The last to arrive takes the step for all, in its own thread, and each gets the outputs
of its own rows. A completion that comes meanwhile takes part from the next step on; one that ends, fails or is told to
end takes its rows along and holds nobody up. What a step raises reaches all whose step it was.

One version samples a step: nobody steps while one of them is at its turn, and no weights change while one has arrived,
since it holds them (Receiver.serving) until its next turn. Whoever waits for the others takes its turn again every
RETURN_S, so that it does not hold them for ever, against another whose turn waits for their change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from transfer.memory import garbage

RETURN_S = 0.01  # until one who waits for others' turns takes its own again
STEP_S = 600.0  # for one step
LATE = f"the engine's step has not ended within {STEP_S:g} s"
COLLECT_STEPS = 4096  # between two garbage collections while completions never end all at once

Turn = Callable[[], int | None]


class Engine(Protocol):
    """What is stepped; called by one thread at a time."""

    def step(self) -> Iterable[Any]:
        """One step of all requests; outputs with `request_id`, and `finished` for a request's last."""

    def abort_request(self, names: list[str]) -> None: ...
    def changed(self) -> None:
        """Other weights take the next step than took the last one of a request."""


class Part:
    """One completion's part in the steps; its methods are for its own thread."""

    def __init__(self, stepping: Stepping, turn: Turn) -> None:
        self._stepping = stepping
        self._turn = turn
        self.version: int | None = None  # as its last turn told
        self.before: int | None = None  # as its last step had it
        self.rows: dict[str, int] = {}  # by request, of those that the engine has not finished
        self.arrived = False  # it waits for a step, or one is taken for it
        self.outputs: list[tuple[int, Any]] = []  # of the last step
        self.error: BaseException | None = None  # that it raised

    def ready(self) -> int | None:
        """Wait until no step is under way: the version of the weights, or None if the completion is to end."""
        while self.take_turn() is not None and not self._stepping.rests():
            pass
        return self.version

    def submit(self, rows: dict[str, int], hand_over: Callable[[], None]) -> None:
        """Give the engine requests, of which each samples a row: `hand_over` does it, when the part is ready."""
        self._stepping.submit(self, rows, hand_over)

    def step(self) -> list[tuple[int, Any]] | None:
        """The outputs of its rows in the next step, whoever takes it; None if the completion is to end."""
        while self.take_turn() is not None:
            if self._stepping.stepped(self):
                return self.outputs
        return None

    def take_turn(self) -> int | None:
        """Ask for the version that samples the next tokens; weights may change meanwhile."""
        self.version = self._turn()
        return self.version


class Stepping:
    """One engine, and the completions that share its steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._handing_over = threading.Lock()
        self._changed = threading.Condition()
        self._parts: list[Part] = []
        self._owners: dict[str, Part] = {}  # by request
        self._under_way = False  # a step
        self._collector = Collector()

    @contextmanager
    def joined(self, turn: Turn) -> Iterator[Part]:
        """Take part in the steps; requests that are not finished at the end are aborted."""
        part = Part(self, turn)
        with self._changed:
            if not self._parts:
                self._collector.rest()
            self._parts.append(part)
        try:
            yield part
        finally:
            try:
                self._withdraw(part)
            finally:
                self._leave(part)

    def rests(self) -> bool:
        """Wait until no step is under way, for RETURN_S at most; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._under_way, RETURN_S)

    def submit(self, part: Part, rows: dict[str, int], hand_over: Callable[[], None]) -> None:
        """Note whose the requests are, and hand them over."""
        with self._changed:
            part.rows |= rows
            self._owners |= dict.fromkeys(rows, part)
        with self._handing_over:
            hand_over()

    def stepped(self, part: Part) -> bool:
        """Meet the others for a step, and take it if the part is the last; False if somebody's turn takes longer."""
        with self._changed:
            part.arrived, part.outputs, part.error = True, [], None
            if not self._changed.wait_for(lambda: self._begins(part), RETURN_S):
                part.arrived = False
                return False
            if self._under_way and not self._changed.wait_for(lambda: not part.arrived, STEP_S):
                raise TimeoutError(LATE)
            leads = part.arrived
            self._under_way |= leads
        if leads:
            self._step()
        if part.error is not None:
            raise part.error
        return True

    def _begins(self, part: Part) -> bool:
        """Whether the part's next step can be taken, is under way, or has been taken."""
        return self._under_way or not part.arrived or all(other.arrived for other in self._parts)

    def _step(self) -> None:
        """One step for all that have arrived."""
        outputs: list[Any] = []
        error: BaseException | None = None
        try:
            if any(part.before not in (None, part.version) for part in tuple(self._parts) if part.arrived):
                self._engine.changed()
            outputs = list(self._engine.step())
            self._collector.stepped()
        except BaseException as raised:  # whose step it was raise it, the part that leads among them
            error = raised
        with self._changed:
            for part in self._parts:
                if part.arrived:
                    part.arrived, part.error, part.before = False, error, part.version
            for output in outputs:
                self._give(output)
            self._under_way = False
            self._changed.notify_all()

    def _give(self, output: Any) -> None:
        """An output to the part whose request it is of; to none if that has left."""
        name = output.request_id
        if (owner := self._owners.get(name)) is None:
            return
        owner.outputs.append((owner.rows[name], output))
        if output.finished:
            del self._owners[name], owner.rows[name]

    def _withdraw(self, part: Part) -> None:
        """Abort what is left of the part, between two steps."""
        with self._changed:
            part.arrived = False
            if not self._changed.wait_for(lambda: not self._under_way, STEP_S):
                raise TimeoutError(LATE)
        if part.rows:
            with self._handing_over:
                self._engine.abort_request(list(part.rows))

    def _leave(self, part: Part) -> None:
        with self._changed:
            self._parts.remove(part)
            for name in part.rows:
                del self._owners[name]
            if not self._parts:
                self._collector.go_on()
            self._changed.notify_all()


class Collector:
    """Python's garbage collector, which rests while requests live, so that it does not look through what they hold."""

    def __init__(self) -> None:
        self._steps = 0

    def rest(self) -> None:
        """Collect nothing until `go_on`, but for every COLLECT_STEPS steps."""
        self._steps = 0
        garbage.rest()

    def stepped(self) -> None:
        """A step has been taken."""
        self._steps += 1
        if self._steps % COLLECT_STEPS == 0:
            garbage.collect_alone()

    def go_on(self) -> None:
        """As before `rest`."""
        garbage.go_on()
