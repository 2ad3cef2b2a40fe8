"""One version to all workers, or to none as far as that can be undone: two phases, with the trainer as coordinator.

    stage      start and update, to all workers at once: they take the bytes, and go on serving what they served
    finish     only when all have staged: each replaces its weights and the version in one go
    abort      otherwise, to all: the live weights are the old ones everywhere
    unheard    a finish without an answer: the worker is asked what it serves, and may have finished all the same

With one worker that a message takes time to reach, the phases are one message. A worker that dies in a phase gets that
phase, and those before, again (worker_recovery.py). After a failure nobody may know how the update has ended somewhere:
then `unsure` holds until the workers are taken over anew (takeover.py). What a worker makes of each message is said in
agreement/protocol.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transfer.agreement.wire import RemoteError
from transfer.trainer.fencing import Fence
from transfer.trainer.fleet import CLEAN_UP_S, Failures, Fleet, Member, is_remote, raise_for
from transfer.trainer.publication import Publication, Written
from transfer.trainer.version_order import VersionOrder
from transfer.trainer.withdrawal import Withdrawal
from transfer.trainer.worker_recovery import WorkerRecovery

Messages = list[tuple[str, dict[str, Any]]]  # verbs and bodies


class TwoPhaseCommit:
    """Makes written versions the live ones of workers."""

    def __init__(
        self,
        fleet: Fleet,
        fence: Fence,
        recovery: WorkerRecovery,
        versions: VersionOrder,
        publication: Publication,
        withdrawal: Withdrawal,
    ) -> None:
        self.unsure = True  # an update has ended, nobody knows how, in some worker
        self._fleet = fleet
        self._fence = fence
        self._recovery = recovery
        self._versions = versions
        self._publication = publication
        self._withdrawal = withdrawal

    def run(self, members: Sequence[Member], written: Written) -> None:
        """Let these workers take one version, all or none; TransferError says who failed, in which phase, and why."""
        self.unsure = True
        try:
            if len(members) == 1 and is_remote(members[0]):
                self._in_one_message(members, written)
            else:
                self._in_two_phases(members, written)
        finally:
            self._publication.release()
        self.unsure = False

    def _in_one_message(self, members: Sequence[Member], written: Written) -> None:
        self._stage_all(members, written, f"the update to version {written.version}", finish=True)

    def _in_two_phases(self, members: Sequence[Member], written: Written) -> None:
        self._stage_all(members, written, f"staging version {written.version}")
        self._finish_all(members, written)

    def _stage_all(self, members: Sequence[Member], written: Written, phase: str, finish: bool = False) -> None:
        failures = self._recovery.retried(
            self._stage(members, written, finish),
            lambda again: self._stage(again, written, finish),
            together=self._publication.broadcasts,
        )
        if failures:
            self._abort(members, written.version)
            raise_for(phase, failures)

    def _finish_all(self, members: Sequence[Member], written: Written) -> None:
        def from_the_start(again: list[Member]) -> Failures:
            failures = self._stage(again, written)
            staged = [member for member in again if member not in failures]
            return failures | self._finish(staged, written.version)

        failures = self._recovery.retried(self._finish(members, written.version), from_the_start)
        raise_for(f"finishing version {written.version}", failures)

    # --- one phase of it ----------------------------------------------------------------------------------------------

    def _stage(self, members: Sequence[Member], written: Written, finish: bool = False) -> Failures:
        """Start and update in these workers, in one message where that saves time; with `finish` all three."""
        ahead = _ahead(members, written.version)
        takers = [member for member in members if member not in ahead]
        part = self._publication.part(written.version, self._fence.epoch, takers)
        where = written.where if part is None else written.where | part.where
        at_once = all(map(is_remote, takers))
        messages = _staging(self._fence.epoch, written, where, at_once, finish)
        if finish:
            self._told_to_finish(takers, written.version)
        work = 2 + finish if at_once else 1
        answers, failures = self._fleet.converse(takers, messages, alongside=part, work=work)
        return ahead | (self._finished(answers, failures, written.version) if finish else failures)

    def _finish(self, members: Sequence[Member], version: int) -> Failures:
        self._told_to_finish(members, version)
        body = {"epoch": self._fence.epoch, "weight_version": str(version)}
        answers, failures = self._fleet.ask(members, "finish_weight_update", body)
        failures = self._finished(answers, failures, version)
        self._abort(list(failures), version)
        return failures

    def _abort(self, members: Sequence[Member], version: int) -> None:
        """Give the update up, so that nobody holds a stage until its lease ends; who does not hear it does."""
        self._fleet.ask(members, "abort_weight_update", {"epoch": self._fence.epoch, "version": version}, CLEAN_UP_S)

    # --- who serves it ------------------------------------------------------------------------------------------------

    def _told_to_finish(self, members: Sequence[Member], version: int) -> None:
        """Note that these workers may serve `version` from now on."""
        self._versions.use_up(version)
        if self._publication.exposes:
            self._withdrawal.note(members)

    def _finished(self, answers: Collection[Member], failures: Failures, version: int) -> Failures:
        """Note who serves `version`, also those whose answer was lost; the failures of all others."""
        for member in [*answers, *self._finished_unheard(list(failures), version)]:
            member.serves = version
            failures.pop(member, None)
        return failures

    def _finished_unheard(self, members: Sequence[Member], version: int) -> list[Member]:
        """Which of these workers serve `version`, although their answer was lost."""
        status, _ = self._fleet.ask(members, "status", {}, CLEAN_UP_S)
        ours = [member for member, answer in status.items() if not self._fence.is_anothers(answer)]
        return [m for m in ours if (status[m]["version"], status[m]["epoch"]) == (version, self._fence.epoch)]


def _ahead(members: Sequence[Member], version: int) -> Failures:
    """Workers that serve this version or a newer one: started again, and given the number by somebody else."""
    return {
        member: RemoteError(member.sender.name, "status", 409, f"serves version {member.serves}, not from us")
        for member in members
        if member.serves is not None and member.serves >= version
    }


def _staging(epoch: int, written: Written, where: Mapping[str, Any], at_once: bool, finish: bool) -> Messages:
    """What stages a version: two messages, or one, which with `finish` finishes it, too."""
    named = {"epoch": epoch, "version": written.version}
    start = named if written.digest is None else {**named, "digest": written.digest}
    if at_once:
        return [("start_weight_update", {**start, "where": where, "finish": finish})]
    return [("start_weight_update", start), ("update_weights", {"update_info": {**named, "where": where}})]
