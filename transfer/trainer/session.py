"""The trainer's half of the weight transfer: agree once, then carry one version after the other to all workers.

    open        take the workers over and agree on names, dtypes and shapes        takeover.py, fencing.py
    push        check, number, write, then stage and finish in all workers         weight_checks.py, version_order.py,
                                                                                   publication.py, two_phase_commit.py
    withdraw    before the trainer's memory changes, where workers serve it        withdrawal.py
    recover     a worker that was started again gets the newest version            worker_recovery.py
    join        a further worker gets it, too; `leave`: one goes                    membership.py

After a failure the next verb takes a new epoch first: then no late message of the failed one counts, and what each
worker serves is known. Each part decides one thing; here is only their order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from transfer.agreement.journal import Journal
from transfer.agreement.manifest import DTYPES, Manifest
from transfer.backends.base import Publisher, Weights
from transfer.config import NO_KEEP, InFlight, TransferConfig, Verify
from transfer.trainer.fencing import Fence
from transfer.trainer.fleet import Answers, Fleet, raise_for
from transfer.trainer.interfaces import Sender
from transfer.trainer.membership import Membership
from transfer.trainer.publication import Publication
from transfer.trainer.push_stats import PushStats
from transfer.trainer.takeover import Takeover
from transfer.trainer.two_phase_commit import TwoPhaseCommit
from transfer.trainer.version_order import VersionOrder, highest
from transfer.trainer.weight_checks import WeightChecks
from transfer.trainer.withdrawal import Withdrawal
from transfer.trainer.worker_recovery import WorkerRecovery


class Session:
    """Carries versions of one policy to its workers; all serve the new one, or all go on with the old."""

    def __init__(self, publisher: Publisher, config: TransferConfig, in_flight: InFlight, journal: Journal) -> None:
        if publisher.exposes and in_flight is InFlight.keep:
            raise ValueError(NO_KEEP)
        timeout_s = config.sender.timeout_s
        self.endpoint: Mapping[str, Any] = publisher.endpoint  # what a worker is told, privately, at its launch; JSON
        self.with_digest = config.verify is not Verify.off  # whether a push carries one; else workers verify nothing
        self.last = PushStats()
        self._publisher = publisher
        self._journal = journal
        self._checks = WeightChecks(publisher, Manifest((), 0), ())
        terms = {"timeout_s": timeout_s, "verify": config.verify.value, "in_flight": in_flight.value}
        self._fleet = fleet = Fleet(timeout_s)
        self._fence = fence = Fence(fleet, terms)
        self._versions = versions = VersionOrder()
        self._publication = publication = Publication(publisher, journal)
        self._recovery = recovery = WorkerRecovery(fleet, fence, journal)
        self._withdrawal = withdrawal = Withdrawal(fleet, fence, recovery, journal)
        self._commit = commit = TwoPhaseCommit(fleet, fence, recovery, versions, publication, withdrawal)
        self._takeover = Takeover(fleet, fence, recovery, versions, publication, commit)
        self._membership = Membership(fleet, fence, versions, commit, withdrawal, journal)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def epoch(self) -> int:
        """The highest that this session has taken."""
        return self._fence.epoch

    def open(self, weights: Weights, senders: Sequence[Sender], version: int = 0, epoch: int = 0) -> None:
        """Take the next epoch and agree with every worker; ValueError with the first differences, or TransferError.

        A trainer that goes on tells the version of its first push, if no worker has a higher one, and the epoch it had.
        """
        if not senders:
            raise ValueError("a transfer needs at least one worker (got no senders)")
        self._commit.unsure = True
        self._fleet.reach(senders)
        status, failures = self._fleet.ask(self._fleet.members, "status", {})
        raise_for("asking for the status", failures)
        manifest = self._prepare(weights, status)
        self._fence.epoch = max(epoch, highest("epoch", {member: answer["epoch"] for member, answer in status.items()}))
        self._versions.use_up(version - 1)
        self._takeover.take(opening=True)
        self._journal.write("open", epoch=self._fence.epoch, manifest=manifest.digest)

    def push(self, weights: Weights) -> int:
        """Make `weights` the live ones in every worker, or in none; the new version. TransferError: who failed, why."""
        began = time.monotonic()
        self._recovery.restarts, self._fleet.messages = 0, []
        self._check_open()
        if self._takeover.is_due:
            self._takeover.take()
        version = self._versions.next
        self._checks.check(weights, version)
        writing = time.monotonic()
        written = self._publication.write(weights, version, self._fence.epoch, self._fleet.served, self.with_digest)
        wrote = time.monotonic()
        self._commit.run(self._fleet.members, written)
        self._versions.newest = version
        stays = self._publisher.exposes or not written.where  # a backend that says no place has moved nothing
        nbytes = 0 if stays else self._checks.manifest.nbytes
        seconds, messages = time.monotonic() - began, self._fleet.messages
        self.last = PushStats(nbytes, seconds, wrote - writing, messages, self._recovery.restarts)
        self._journal.write("pushed", epoch=self._fence.epoch, version=version, digest=written.digest)
        return version

    def withdraw(self) -> None:
        """Before the weights change: no worker serves the trainer's own memory after this; TransferError: who may.

        Nothing is done, or said, where workers have memory of their own.
        """
        self._publication.take_back()
        self._withdrawal.withdraw(self._versions.highest)

    def recover(self, sender: Sender) -> bool:
        """Bring a worker that has lost its weights, because it was started again, to the newest version.

        False if it has lost nothing, or cannot be helped, or has left: whatever failed there has another reason. To be
        called in the thread that started the workers.
        """
        member = self._fleet.member(sender)
        if member is None:
            return False
        if self._takeover.is_due:
            self._takeover.take()
            return member.serves is not None and member.serves == self._versions.newest
        written = self._publication.kept(self._versions.newest)
        if written is None or not self._recovery.rejoined([member]):
            return False
        self._commit.run([member], written)
        return True

    def join(self, sender: Sender) -> bool:
        """Take a further worker in, between two updates: True if it serves the newest version now.

        False where its bytes are not there any more: then the next push brings it one, and before that it has nothing
        to serve. ValueError or TransferError says why it cannot be taken in, and nothing is changed.
        """
        if not self._fleet.members:
            raise ValueError("open the transfer before a worker joins it")
        if self._takeover.is_due:
            self._takeover.take()
        return self._membership.join(sender, self._publication.kept(self._versions.newest))

    def leave(self, sender: Sender) -> None:
        """Go on without this worker, between two updates; ValueError for the last one."""
        self._membership.leave(sender)

    def close(self) -> None:
        """Give up what the backend holds; workers keep their version: `withdraw` it before you train on."""
        self._fleet.reach([])
        self._publisher.close()

    def _check_open(self) -> None:
        """ValueError, which says what to call first, unless weights may be pushed now."""
        if not self._fleet.members:
            raise ValueError("open the transfer before the first push")
        if self._withdrawal.viewers:
            raise ValueError(
                "workers still serve the weights of the last push, which are the trainer's own memory: "
                "call withdraw() before the weights are changed, then push()"
            )

    def _prepare(self, weights: Weights, status: Answers) -> Manifest:
        """Lay the weights out, and make room for them; from now on they are in other memory than before."""
        manifest = Manifest.of(weights, _agreed_dtype(status) if self._publisher.casts else None)
        where = self._publication.prepare(manifest, weights)
        self._fence.terms |= {"manifest": manifest.to_json(), "where": where}
        self._checks = WeightChecks(self._publisher, manifest, list(weights))
        self._withdrawal.viewers.clear()
        return manifest


def _agreed_dtype(status: Answers) -> torch.dtype | None:
    """The one floating-point dtype of all workers, to cast to; None where their models mix several."""
    wanted = {member.sender.name: answer["dtype"] for member, answer in status.items()}
    if len(set(wanted.values())) > 1:
        raise ValueError(f"all workers must have one dtype, so that the weights can be written once (got {wanted})")
    name = next(iter(wanted.values()))
    return None if name is None else DTYPES[name]
