"""vLLM's one-shot form of an update: messages without an epoch, which bring handles of tensors, not their place.

A start, messages with a part of the weights each, and a finish, which may name the version; or one message with all.
It goes on until a trainer has taken an epoch: from then on these messages are an older trainer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfer.agreement import protocol
from transfer.worker.standing import Standing
from transfer.worker.update import Updates


class OneShot:
    """Finds the versions that these messages leave out; what they do is an update's work like any."""

    def __init__(self, updates: Updates, standing: Standing) -> None:
        self._updates = updates
        self._standing = standing

    def start(self) -> None:
        """Begin an update to the next version."""
        self._updates.start(protocol.Start(0, self._next()))

    def update(self, info: Mapping[str, Any]) -> None:
        """Stage the tensors of an `update_info`; with no start before, they are the whole update."""
        whole = self._standing.now().target is None
        version = self._next()
        if whole:
            self._updates.start(protocol.Start(0, version))
        self._updates.stage_by(protocol.Update(0, version), lambda: self._updates.chunks.stage(info))
        if whole:
            self._finish(version)

    def finish(self, label: str | None) -> None:
        """Make the update under way the live weights, as `label` if its trainer numbers the versions itself."""
        self._finish(self._next() if label is None else self._labelled(int(label)))

    def _finish(self, version: int) -> None:
        self._updates.finish(protocol.Finish(0, version), self._updates.chunks.check_complete)

    def _next(self) -> int:
        """The version under way, or the one after the newest."""
        state = self._standing.now()
        if state.target is not None:
            return state.target
        return 0 if state.version is None else state.version + 1

    def _labelled(self, version: int) -> int:
        self._standing.state, _ = self._standing.step(protocol.Rename(0, version))
        return version
