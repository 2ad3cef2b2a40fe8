"""Workers that come and go while a session is open, between two updates.

    join     a newcomer agrees on the weights, in the epoch that the others have; then it gets the newest version, where
             its bytes are still there, else the next push brings it one: only then has it anything to serve
    leave    who serves the trainer's own memory is told that this ends, and no message is sent to that worker any more

What fails in a newcomer is said by an error, and leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfer.agreement.journal import Journal
from transfer.agreement.wire import TransferError
from transfer.trainer.fencing import Fence
from transfer.trainer.fleet import Fleet, Member, raise_for
from transfer.trainer.interfaces import Sender
from transfer.trainer.publication import Written
from transfer.trainer.two_phase_commit import TwoPhaseCommit
from transfer.trainer.version_order import NONE, VersionOrder
from transfer.trainer.withdrawal import Withdrawal


class Membership:
    """Changes who is in a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        fence: Fence,
        versions: VersionOrder,
        commit: TwoPhaseCommit,
        withdrawal: Withdrawal,
        journal: Journal,
    ) -> None:
        self._fleet = fleet
        self._fence = fence
        self._versions = versions
        self._commit = commit
        self._withdrawal = withdrawal
        self._journal = journal

    def join(self, sender: Sender, written: Written | None) -> bool:
        """Take this worker in, and give it what is `written`, the newest version; whether it serves that now.

        ValueError if its model differs, or another trainer has used it; TransferError with any other reason.
        """
        member = Member(sender)
        has_it = self._agree(member)
        if written is not None and not has_it:
            self._bring(member, written)
        self._fleet.regroup([*self._fleet.members, member])
        serves = has_it or written is not None
        version = self._versions.newest if serves else None
        self._journal.write("join", worker=sender.name, epoch=self._fence.epoch, version=version)
        return serves

    def leave(self, sender: Sender) -> None:
        """Go on without this worker, whatever it does; ValueError for the last one."""
        member = self._fleet.member(sender)
        if member is None:
            return
        others = [each for each in self._fleet.members if each is not member]
        if not others:
            raise ValueError("a transfer needs at least one worker: the last one cannot leave")
        self._withdrawal.dismiss(member, self._versions.highest)
        self._fleet.regroup(others)
        self._journal.write("leave", worker=sender.name, epoch=self._fence.epoch, version=member.serves)

    def _agree(self, member: Member) -> bool:
        """Let it take our epoch; whether it has the newest version already, as one that had left may."""
        status, silent = self._fleet.ask([member], "status", {})
        raise_for("joining", silent)
        told = status[member]
        ours = (told["epoch"], told["trainer"]) == (self._fence.epoch, self._fence.trainer)
        self._check_free(member, told)
        replaced = self._fence.replaced
        failures = self._fence.agree([member])
        self._fence.replaced = replaced  # what another trainer does with a newcomer says nothing of our workers
        for failure in failures.values():
            if failure.status == 422:
                raise ValueError(str(failure)) from failure
        raise_for("joining", failures)
        return ours and member.serves is not None and member.serves == self._versions.newest

    def _check_free(self, member: Member, told: Mapping[str, Any]) -> None:
        """ValueError for a worker with an epoch or a version of another trainer's that is beyond what we have."""
        newest = NONE if told["newest"] is None else told["newest"]
        if self._fence.is_anothers(told) or newest > self._versions.highest:
            raise ValueError(
                f"{member.sender.name} has had another trainer (epoch {told['epoch']}, version {told['newest']}; ours "
                f"are {self._fence.epoch} and {self._versions.newest}): start that worker anew"
            )

    def _bring(self, member: Member, written: Written) -> None:
        try:
            self._commit.run([member], written)
        except TransferError:
            self._commit.unsure = False  # as before: nobody else was told anything
            self._withdrawal.viewers.pop(member, None)
            raise
