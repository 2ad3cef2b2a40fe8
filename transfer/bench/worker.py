"""The receiving process of our own ways: a plain worker that also says how long its part of the last update took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from transfer.worker.plain_worker import PlainSpec, PlainWorker


class BenchWorker(PlainWorker):
    """A PlainWorker whose `status` has two more fields, both of the last update, seconds.

    flip_seconds: from having the gate alone to READY, the time in which nothing can be served
    verb_seconds: within the verbs of the update; what the trainer waits beyond that is the control plane's
    """

    def __init__(self, spec: PlainSpec) -> None:
        self._verb_seconds = 0.0
        super().__init__(spec)

    def status(self, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As ever, and the two durations."""
        return super().status(body) | {"flip_seconds": self._updates.flip_seconds, "verb_seconds": self._verb_seconds}

    def start_weight_update(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """As ever, timed."""
        self._verb_seconds = 0.0
        return self._timed(super().start_weight_update, body)

    def update_weights(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """As ever, timed."""
        return self._timed(super().update_weights, body)

    def finish_weight_update(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """As ever, timed."""
        return self._timed(super().finish_weight_update, body)

    def _timed(self, verb: Callable[[Mapping[str, Any]], dict[str, Any]], body: Mapping[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            return verb(body)
        finally:
            self._verb_seconds += time.perf_counter() - began


class RayBenchWorker(BenchWorker):
    """A BenchWorker as a Ray actor, which is built and dropped again for each model."""

    def __init__(self) -> None:
        """Nothing yet."""

    def build(self, spec: PlainSpec) -> None:
        """Hold the model of `spec`."""
        super().__init__(spec)

    def drop(self) -> None:
        """Give its memory back."""
        self.close()
        self.__dict__.clear()
