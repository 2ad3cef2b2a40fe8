"""Completions and new weights take turns: what is sampled with, token for token, and who waits for whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from transfer.config import InFlight
from transfer.worker.gate import Gate
from transfer.worker.standing import Standing


class Turns:
    """Asked before each token of a completion; `versions` are those that it was told, each once.

    `steady`: there will be one, since new weights wait for the completion's end; `uncut`: it goes on with others.
    """

    def __init__(self, turn: Callable[[], int | None], gate: Gate, in_flight: InFlight) -> None:
        self._turn = turn
        self._gate = gate
        self.steady = in_flight is InFlight.wait
        self.uncut = in_flight is InFlight.keep
        self.versions: list[int] = []

    @property
    def due(self) -> bool:
        """Whether new weights wait for it."""
        return self._gate.wanted and not self.steady

    def __call__(self) -> int | None:
        """The version of the weights that the next token is sampled with; None if the completion is to end here."""
        version = self._turn()
        if version is not None and version not in self.versions[-1:]:
            self.versions.append(version)
        return version


class Serving:
    """Lets completions read the live weights; `gate` is shared by them, and had alone by whoever replaces weights."""

    def __init__(self, standing: Standing, gate: Gate) -> None:
        self._standing = standing
        self._gate = gate

    @contextmanager
    def turns(self) -> Iterator[Turns]:
        """Hold the live weights as they are, but for `Turns`; Refused 503 if there are none to serve."""
        standing = self._standing
        with self._gate.shared(standing.terms.timeout_s):
            standing.serves()
            in_flight = standing.terms.in_flight  # as it was agreed when the completion began
            turns = Turns(partial(self._turn, in_flight), self._gate, in_flight)
            began = time.monotonic()
            try:
                yield turns
            finally:
                standing.journal.write("serve", versions=turns.versions, digest=standing.state.digest, began=began)

    def _turn(self, in_flight: InFlight) -> int | None:
        """The version that the next token is sampled with, after a flip that waits; None: end the completion."""
        if self._gate.wanted and in_flight is InFlight.abort:
            return None
        if self._gate.wanted and in_flight is InFlight.keep:
            self._gate.give_way(self._standing.terms.timeout_s)
        return self._standing.serves()
