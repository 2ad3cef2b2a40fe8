"""Taking workers over: when a session opens, and after any failure, before the next version is sent.

    status      has another trainer come since? Then this one says so, and takes no worker back
    agree       the next epoch in all workers, so that no earlier message counts any more (fencing.py)
    learn       what each worker serves, and which version is the newest (version_order.py)
    catch up    workers that missed the end of the last update get its version, while the bytes are there

A session whose update has failed takes its own workers over: its messages may still be on their way.
"""

from __future__ import annotations

from transfer.agreement.wire import TransferError
from transfer.trainer.fencing import Fence
from transfer.trainer.fleet import CLEAN_UP_S, Failures, Fleet, raise_for
from transfer.trainer.publication import Publication
from transfer.trainer.two_phase_commit import TwoPhaseCommit
from transfer.trainer.version_order import VersionOrder
from transfer.trainer.worker_recovery import WorkerRecovery


class Takeover:
    """Makes this trainer the one that a fleet obeys, and finds out where each worker stands."""

    def __init__(
        self,
        fleet: Fleet,
        fence: Fence,
        recovery: WorkerRecovery,
        versions: VersionOrder,
        publication: Publication,
        commit: TwoPhaseCommit,
    ) -> None:
        self._fleet = fleet
        self._fence = fence
        self._recovery = recovery
        self._versions = versions
        self._publication = publication
        self._commit = commit

    @property
    def is_due(self) -> bool:
        """Whether no version may be sent before this: a worker's state is not known, or is another trainer's."""
        return self._commit.unsure or self._fence.replaced

    def take(self, opening: bool = False) -> None:
        """Take the next epoch in all workers; TransferError: who did not agree; ValueError: whose model differs.

        A session that opens takes them from whoever had them.
        """
        failures = self._take_epoch(opening)
        for failure in failures.values():
            if failure.status == 422:
                raise ValueError(str(failure)) from failure
        raise_for("agreeing on the weights", self._recovery.retried(failures, lambda again: {}))
        self._versions.learn(self._fleet.members)
        self._commit.unsure = False
        self._catch_up()

    def _take_epoch(self, opening: bool) -> Failures:
        fence, members = self._fence, self._fleet.members
        status, _ = self._fleet.ask(members, "status", {}, CLEAN_UP_S)
        fence.replaced = not opening and (fence.replaced or any(map(fence.is_anothers, status.values())))
        failures: Failures = {}
        if not fence.replaced:
            fence.epoch += 1
            failures = fence.agree(members)
        if fence.replaced:
            raise TransferError(
                f"another trainer has taken over these workers (our epoch was {fence.epoch}): "
                "open the transfer again to take them back"
            )
        return failures

    def _catch_up(self) -> None:
        """Bring workers that missed the end of the last update to its version: then no slot but that one is served."""
        newest = self._versions.newest
        behind = [member for member in self._fleet.members if member.serves != newest]
        written = self._publication.kept(newest) if behind else None
        if written is not None:
            self._commit.run(behind, written)
