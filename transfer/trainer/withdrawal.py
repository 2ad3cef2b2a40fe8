"""Where workers serve the trainer's own memory: before that changes they stop, so that none serves a mixture.

    viewers     workers that were told to finish a version, and may serve that memory since, heard or not
    withdraw    to each of them: serve nothing up to this version; who confirms it views nothing any more

Only while there are no viewers may the weights change, or be pushed again. Workers with memory of their own never view.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transfer.agreement.journal import Journal
from transfer.trainer.fencing import Fence
from transfer.trainer.fleet import Failures, Fleet, Member, raise_for
from transfer.trainer.worker_recovery import WorkerRecovery


class Withdrawal:
    """The workers of a fleet that may serve the trainer's own memory, and how they stop."""

    def __init__(self, fleet: Fleet, fence: Fence, recovery: WorkerRecovery, journal: Journal) -> None:
        self.viewers: dict[Member, None] = {}  # in order
        self._fleet = fleet
        self._fence = fence
        self._recovery = recovery
        self._journal = journal

    def note(self, members: Iterable[Member]) -> None:
        """From now on these may serve the trainer's own memory."""
        self.viewers |= dict.fromkeys(members)

    def withdraw(self, version: int) -> None:
        """Let no viewer serve `version`, or an older one, any more; TransferError: who may go on.

        One that has died has stopped, too, once it is back.
        """
        if not self.viewers:
            return
        failures = self._tell(list(self.viewers), version)
        failures = self._recovery.retried(failures, lambda again: self._tell(again, version))
        raise_for(f"withdrawing version {version}", failures)
        self._journal.write("withdraw", epoch=self._fence.epoch, version=version)

    def dismiss(self, member: Member, version: int) -> None:
        """One that leaves views nothing any more, or does not answer and is no concern of ours."""
        if member in self.viewers:
            self._tell([member], version)
            self.viewers.pop(member, None)

    def _tell(self, members: Sequence[Member], version: int) -> Failures:
        """Let these workers serve nothing up to `version`; who may go on."""
        body = {"epoch": self._fence.epoch, "version": version}
        answers, failures = self._fleet.ask(members, "withdraw_weights", body)
        for member in answers:
            member.serves = None
            self.viewers.pop(member, None)
        return failures
