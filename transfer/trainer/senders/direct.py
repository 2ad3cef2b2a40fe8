"""Sender to a worker in this process: its methods are called as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfer.agreement import wire


class DirectSender:
    """Calls `worker.<verb>(body)`; a refusal becomes the RemoteError that any other sender raises."""

    def __init__(self, worker: Any, name: str) -> None:
        self._worker = worker
        self.name = name

    def call(self, verb: str, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """The worker's answer; a call in the same thread has no deadline of its own."""
        try:
            return wire.handed_on(getattr(self._worker, verb)(dict(body)))
        except wire.Refused as error:
            raise wire.RemoteError(self.name, verb, error.status, error.reason) from error

    def restart(self) -> bool:
        """A worker in this process lives as long as it."""
        return False

    def close(self) -> None:
        """The worker belongs to whoever made it."""
