"""Steps of an engine that any number of completions share, each in a thread of its own; no thread is added.

    with stepping.joined(turn) as part:
        version = part.ready()                          # no step is under way, and none begins before part.step()
        part.submit({name: row, ...}, hand_over)        # give the engine requests
        while part.rows and (outputs := part.step()) is not None:
            ...                                         # [(row, output)], all of weights `part.version`

The completions that run meet before a step. Each calls its own `turn`, which tells the version of the weights, and may
wait while new ones come in. The last to arrive takes steps for all, in its own thread, for as long as nobody's turn is
due (Turn.due): new weights wait, or a completion is to end. Each gets the outputs of its own rows when all of those
have ended, or before its next turn. A completion that comes meanwhile takes part from the next step on; one that ends,
fails or is told to end takes its rows along and holds nobody up. What a step raises reaches all whose step it was.

One version samples a step: nobody steps while one of them is at its turn, and no weights change while one has arrived,
since it holds them (Receiver.serving) until its next turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rlhf.rollout.engine import Turn
from transfer.memory import garbage

LOOK_S = 0.01  # until one who waits for others' turns looks whether its own is due
STEP_S = 600.0  # for one step
LATE = f"the engine's step has not ended within {STEP_S:g} s"
MOST_OUTPUTS = 4096  # that are kept for a completion before it is to take them
COLLECT_STEPS = 4096  # between two garbage collections while completions never end all at once


class Stepped(Protocol):
    """What is stepped; called by one thread at a time."""

    def step(self) -> Iterable[Any]:
        """One step of all requests; outputs with `request_id`, and `finished` for a request's last."""

    def abort_request(self, names: list[str]) -> None: ...
    def changed(self) -> None:
        """Other weights take the next step than took the last one of a request."""

    def progress(self) -> Mapping[str, int]:
        """How many tokens each request has by now; of those that tell them only at their end."""


class Part:
    """One completion's part in the steps; its methods are for its own thread."""

    def __init__(self, stepping: Stepping, turn: Turn) -> None:
        self._stepping = stepping
        self._turn = turn
        self.version: int | None = None  # as its last turn told
        self.before: int | None = None  # as its last step had it
        self.rows: dict[str, int] = {}  # by request, of those that the engine has not finished
        self.changes: list[tuple[int, dict[int, int]]] = []  # versions that gave way, and the tokens of rows by then
        self.arrived = False  # it waits for a step, or one is taken for it
        self.outputs: list[tuple[int, Any]] = []  # since its last turn
        self.error: BaseException | None = None  # that a step raised

    def ready(self) -> int | None:
        """Wait until no step is under way: the version of the weights, or None if the completion is to end."""
        while self.take_turn() is not None and not self._stepping.rests():
            pass
        return self.version

    def submit(self, rows: dict[str, int], hand_over: Callable[[], None]) -> None:
        """Give the engine requests, of which each samples a row: `hand_over` does it, when the part is ready."""
        self._stepping.submit(self, rows, hand_over)

    def step(self) -> list[tuple[int, Any]] | None:
        """The outputs of its rows in the next steps, whoever takes them; None if the completion is to end."""
        while self.take_turn() is not None:
            if self._stepping.stepped(self):
                return self.outputs
        return None

    def take_turn(self) -> int | None:
        """Ask for the version that samples the next tokens; weights may change meanwhile."""
        self.version = self._turn.take()
        return self.version

    @property
    def due(self) -> bool:
        """Whether it is to take its turn before the next step."""
        return self._turn.due()

    @property
    def has_news(self) -> bool:
        """Whether it is to be woken: its rows have ended, a step has failed, or many outputs wait."""
        return not self.rows or self.error is not None or len(self.outputs) >= MOST_OUTPUTS

    @property
    def changes_weights(self) -> bool:
        """Whether its next step has other weights than its last one had."""
        return self.before not in (None, self.version)


class Stepping:
    """One engine, and the completions that share its steps."""

    def __init__(self, engine: Stepped) -> None:
        self._engine = engine
        self._handing_over = threading.Lock()
        self._changed = threading.Condition()
        self._parts: list[Part] = []
        self._owners: dict[str, Part] = {}  # by request
        self._under_way = False  # steps
        self._steps = 0  # that were taken
        self._newcomers = 0  # who wait until none is under way
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
        """Wait until no step is under way, for LOOK_S at most; whether that is so."""
        with self._changed:
            self._newcomers += 1
            try:
                return self._changed.wait_for(lambda: not self._under_way, LOOK_S)
            finally:
                self._newcomers -= 1

    def submit(self, part: Part, rows: dict[str, int], hand_over: Callable[[], None]) -> None:
        """Note whose the requests are, and hand them over."""
        with self._changed:
            part.rows |= rows
            self._owners |= dict.fromkeys(rows, part)
        with self._handing_over:
            hand_over()

    def stepped(self, part: Part) -> bool:
        """Meet the others for steps, and take them if the part is the last; False if its turn is due before one."""
        with self._changed:
            part.arrived, part.outputs, part.error = True, [], None
            while part.arrived:
                if self._begins():
                    self._under_way = True
                    self._lead()
                elif self._under_way:
                    self._wait_for_steps(lambda: not part.arrived)
                elif not self._changed.wait_for(lambda: self._moved(part), LOOK_S) and part.due:
                    part.arrived = False
                    return bool(part.outputs)
        if part.error is not None:
            raise part.error
        return True

    def _moved(self, part: Part) -> bool:
        """Whether the part has steps behind it, or can take some."""
        return not part.arrived or self._under_way or self._begins()

    def _wait_for_steps(self, over: Callable[[], bool]) -> None:
        """Until that is so, or none is under way; TimeoutError if one takes longer than STEP_S."""
        while self._under_way and not over():
            steps = self._steps
            if not self._changed.wait(STEP_S) and self._under_way and steps == self._steps:
                raise TimeoutError(LATE)

    def _begins(self) -> bool:
        """Whether a step can be taken."""
        return not self._under_way and all(other.arrived for other in self._parts)

    def _lead(self) -> None:
        """Take steps until somebody's turn is due, has new rows, or has news; with `_changed`."""
        try:
            while True:
                arrived = [part for part in self._parts if part.arrived]
                self._step(arrived)
                ended = [part for part in arrived if part.has_news]
                due = any(part.due for part in arrived)
                for part in arrived if due else ended:
                    part.arrived = False
                if due or ended or self._newcomers or len(arrived) < len(self._parts):
                    return
        finally:
            self._under_way = False
            self._changed.notify_all()

    def _step(self, arrived: list[Part]) -> None:
        """One step for all that have arrived; `_changed` is free meanwhile."""
        outputs: list[Any] = []
        error: BaseException | None = None
        self._changed.release()
        try:
            if any(part.changes_weights for part in arrived):
                self._note_change(arrived)
            outputs = list(self._engine.step())
            self._collector.stepped()
        except BaseException as raised:  # whose step it was raise it, the part that leads among them
            error = raised
        finally:
            self._changed.acquire()
        self._steps += 1
        for part in arrived:
            part.error, part.before = error, part.version
        for output in outputs:
            self._give(output)

    def _note_change(self, arrived: list[Part]) -> None:
        """Of each row, how many tokens the weights have sampled that have given way."""
        tokens = self._engine.progress()
        for part in arrived:
            if part.changes_weights and part.before is not None:
                part.changes.append((part.before, {row: tokens.get(name, 0) for name, row in part.rows.items()}))
        self._engine.changed()

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
            self._newcomers += 1
            try:
                self._wait_for_steps(lambda: False)
            finally:
                self._newcomers -= 1
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
