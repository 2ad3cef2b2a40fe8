"""Versions on their way: what the backend has written of them, and how long it waits for workers.

    prepare      memory for all versions, once a session; what was written before is gone
    write        the bytes of one version, where workers find them; nobody is told yet
    kept         the same again, for a worker that has missed it, while the bytes are there
    release      the update is over: what is read of the trainer's own memory from now on counts no more
    take back    the same before that memory changes, where workers serve it

No message is sent here: two_phase_commit.py tells workers where the bytes are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from transfer.agreement.dtensor import refuse_dtensors
from transfer.agreement.journal import Journal
from transfer.agreement.manifest import Manifest
from transfer.agreement.wire import TransferError
from transfer.backends.base import BroadcastPublisher, FencedPublisher, Part, Publisher, Weights
from transfer.memory.finite import NotFinite, not_finite
from transfer.trainer.fleet import Member
from transfer.trainer.weight_checks import nonfinite


@dataclass(frozen=True, slots=True)
class Written:
    """One version and where its bytes wait."""

    version: int
    where: dict[str, Any]  # the backend's words
    digest: str | None


class Publication:
    """The versions that one publisher has written, as far as some worker may still need them."""

    def __init__(self, publisher: Publisher, journal: Journal) -> None:
        self._publisher = publisher  # what it can do is asked once: isinstance of a protocol takes 20 us
        self._broadcaster = publisher if isinstance(publisher, BroadcastPublisher) else None
        self._fenced = publisher if isinstance(publisher, FencedPublisher) else None
        self._journal = journal
        self._manifest = Manifest((), 0)
        self._written: dict[int, Written] = {}  # versions whose bytes are still there
        self.broadcasts = self._broadcaster is not None  # whether all workers of an update receive it together
        self.exposes = publisher.exposes  # whether workers serve the trainer's own memory

    def prepare(self, manifest: Manifest, weights: Weights) -> dict[str, Any]:
        """Make room for such weights; what a worker must know to take them."""
        if not self._publisher.takes_shards:
            refuse_dtensors(weights)
        self._written = {}  # also if there is no room: what held them may be gone
        where = self._publisher.prepare(manifest, weights)
        self._manifest = manifest
        return where

    def write(self, weights: Weights, version: int, epoch: int, served: Collection[int], with_digest: bool) -> Written:
        """Write one version, over none that is in `served`; TransferError if that fails, or a value is not finite."""
        self._written = {live: self._written[live] for live in served if live in self._written}
        if self._fenced is not None:
            self._fenced.fence(epoch)
        try:
            where, digest = self._publisher.write(version, weights, served, with_digest)
        except (OSError, RuntimeError) as error:  # the latter is torch's, for memory that is not to be had, say
            raise TransferError(f"writing version {version} failed: {error}") from error
        except NotFinite as found:
            raise nonfinite(found.tensor or not_finite(weights, self._manifest), version) from None
        written = self._written[version] = Written(version, where, digest)
        self._journal.write("publish", epoch=epoch, version=version, digest=digest)
        return written

    def kept(self, version: int | None) -> Written | None:
        """This version, if its bytes are still there."""
        written = None if version is None else self._written.get(version)
        if written is None or not self._publisher.keeps:
            return None
        gone = self._broadcaster is not None and not self._broadcaster.holds(written.version)
        return None if gone else written

    def part(self, version: int, epoch: int, takers: Sequence[Member]) -> Part | None:
        """The trainer's part in bringing a version to these workers: None but in a broadcast; TransferError."""
        if self._broadcaster is None or not takers:
            return None
        try:
            return self._broadcaster.alongside(version, [(epoch, id(taker), taker.boot) for taker in takers])
        except (OSError, RuntimeError, ValueError) as error:
            raise TransferError(f"a broadcast of version {version} cannot be set up: {error}") from error

    def release(self) -> None:
        """An update is over, whatever came of it; where workers serve the trainer's memory they go on reading it."""
        if not self.exposes:
            self._publisher.release()

    def take_back(self) -> None:
        """Before the trainer's memory changes: where workers serve it nobody may get it any more."""
        if self.exposes:
            self._written = {}
            self._publisher.release()
