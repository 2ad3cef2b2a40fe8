"""The trainer's half of the weight transfer: agree once, then carry one version after the other to all workers.

    write      the bytes, where workers find them; nobody is told yet
    stage      start and update, to all workers at once
    finish     only when all have staged; else abort to all, and the live weights are the old ones everywhere
    release    whatever came of it: what is read of the trainer's own memory from now on counts no more
    withdraw   where workers serve the trainer's own memory: before that changes, so that none serves a mixture

After a failure the next push takes a new epoch first: then no late message of the failed one counts, and what each
worker serves is known. A version's number is used up once any worker was told to finish it.
"""

from __future__ import annotations

import json
import logging
import operator
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from transfer.agreement import wire
from transfer.agreement.journal import Journal
from transfer.agreement.manifest import DTYPES, Entry, Manifest, same_tensors
from transfer.backends.base import BroadcastPublisher, FencedPublisher, Part, Publisher, Weights
from transfer.config import (
    NO_KEEP,
    InFlight,
    TransferConfig,
    Verify,
)
from transfer.memory.finite import NotFinite, not_finite
from transfer.trainer.fleet import Answers, Failures, Fleet, Member, highest, is_remote
from transfer.trainer.interfaces import Sender

LOG = logging.getLogger(__name__)
SHAPE = operator.attrgetter("shape")
CLEAN_UP_S = 5.0  # deadline of abort and of questions after a failure: the worker may be gone


@dataclass(frozen=True, slots=True)
class Written:
    """One version and where its bytes wait."""

    version: int
    where: dict[str, Any]  # the backend's words
    digest: str | None


@dataclass(frozen=True, slots=True)
class PushStats:
    """What one push moved and took: bytes of weights, seconds, and the messages, both ways, with all workers."""

    bytes: int = 0
    seconds: float = 0.0
    write_seconds: float = 0.0
    messages: Sequence[Mapping[str, Any]] = ()
    restarts: int = 0  # workers that were started again meanwhile

    @property
    def control_bytes(self) -> int:
        """The messages' size as JSON."""
        return sum(len(json.dumps(each, separators=(",", ":"))) for each in self.messages)

    def numbers(self) -> dict[str, float]:
        """All of it by name, for a log."""
        names = ("bytes", "seconds", "write_seconds", "control_bytes", "restarts")
        return {name: float(getattr(self, name)) for name in names}


class Session:
    """Carries versions of one policy to a fixed set of workers; all serve the new one, or all go on with the old."""

    def __init__(self, publisher: Publisher, config: TransferConfig, in_flight: InFlight, journal: Journal) -> None:
        if publisher.exposes and in_flight is InFlight.keep:
            raise ValueError(NO_KEEP)
        self._publisher = publisher  # what it can do is asked once: isinstance of a protocol takes 20 us
        self._broadcaster = publisher if isinstance(publisher, BroadcastPublisher) else None
        self._fenced = publisher if isinstance(publisher, FencedPublisher) else None
        self._timeout_s = config.sender.timeout_s
        self._trainer = secrets.token_hex(8)
        self._agreed: dict[str, Any] = {
            "trainer": self._trainer,
            "timeout_s": self._timeout_s,
            "verify": config.verify.value,
            "in_flight": in_flight.value,
        }
        self.with_digest = config.verify is not Verify.off  # whether a push carries one; else workers verify nothing
        self._journal = journal
        self._fleet = Fleet([], self._timeout_s)
        self._manifest = Manifest((), 0)
        self._shapes: dict[str, torch.Size] = {}  # of its entries
        self._names: list[str] = []  # as the trainer orders them
        self._tied: list[Entry] = []
        self._epoch = 0  # the highest that this session has taken
        self._replaced = False  # by a later trainer, or one that was faster
        self._unsure = True  # an update has ended, nobody knows how, in some worker
        self._newest: int | None = None  # version that any worker has finished
        self._named = -1  # the highest version that any worker was told to finish, and may have served
        self._writes: dict[int, Written] = {}  # versions whose bytes are still there
        self._viewers: dict[Member, None] = {}  # that may serve the trainer's own memory, in order
        self._restarts = 0
        self.endpoint: Mapping[str, Any] = publisher.endpoint  # what a worker is told, privately, at its launch; JSON
        self.last = PushStats()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def epoch(self) -> int:
        """The highest that this session has taken."""
        return self._epoch

    def open(self, weights: Weights, senders: Sequence[Sender], version: int = 0, epoch: int = 0) -> None:
        """Take the next epoch and agree with every worker; ValueError with the first differences, or TransferError.

        A trainer that goes on tells the version of its first push, if no worker has a higher one, and the epoch it had.
        """
        if not senders:
            raise ValueError("a transfer needs at least one worker (got no senders)")
        self._unsure = True
        self._fleet.close()
        self._fleet = Fleet(senders, self._timeout_s)
        status, failures = self._fleet.ask(self._fleet.members, "status", {})
        self._raise("asking for the status", failures)
        self._manifest = Manifest.of(weights, _agreed_dtype(status) if self._publisher.casts else None)
        self._shapes = {entry.name: torch.Size(entry.shape) for entry in self._manifest.entries}
        self._names = list(weights)
        self._tied = [entry for entry in self._manifest.entries if entry.aliases]
        self._agreed |= {
            "manifest": self._manifest.to_json(),
            "where": self._publisher.prepare(self._manifest, weights),
        }
        self._epoch = max(epoch, highest("epoch", {member: answer["epoch"] for member, answer in status.items()}))
        self._named = max(self._named, version - 1)
        self._writes, self._viewers = {}, {}  # the weights are in other memory now
        self._take_over(opening=True)
        self._journal.write("open", epoch=self._epoch, manifest=self._manifest.digest)

    def push(self, weights: Weights) -> int:
        """Make `weights` the live ones in every worker, or in none; the new version. TransferError: who failed, why."""
        began = time.monotonic()
        self._restarts, self._fleet.messages = 0, []
        if not self._fleet.members:
            raise ValueError("open the transfer before the first push")
        if self._viewers:
            raise ValueError(
                "workers still serve the weights of the last push, which are the trainer's own memory: "
                "call withdraw() before the weights are changed, then push()"
            )
        if self._unsure or self._replaced:
            self._take_over()
        version = 1 + max(self._named, -1 if self._newest is None else self._newest)
        self._check(weights, version)
        writing = time.monotonic()
        written = self._write(weights, version)
        wrote = time.monotonic()
        self._update(self._fleet.members, written)
        self._newest = version
        stays = self._publisher.exposes or not written.where  # a backend that says no place has moved nothing
        nbytes = 0 if stays else self._manifest.nbytes
        seconds, messages = time.monotonic() - began, self._fleet.messages
        self.last = PushStats(nbytes, seconds, wrote - writing, messages, self._restarts)
        self._journal.write("pushed", epoch=self._epoch, version=version, digest=written.digest)
        return version

    def withdraw(self) -> None:
        """Before the weights change: no worker serves the trainer's own memory after this; TransferError: who may.

        Nothing is done, or said, where workers have memory of their own.
        """
        if self._publisher.exposes:
            self._writes = {}  # nobody may get them any more
            self._publisher.release()
        if not self._viewers:
            return
        version = max(self._named, -1 if self._newest is None else self._newest)
        viewers = list(self._viewers)
        failures = self._withdraw(viewers, version)
        if again := self._rejoined(list(failures)):
            failures = {m: f for m, f in failures.items() if m not in again} | self._withdraw(again, version)
        self._raise(f"withdrawing version {version}", failures)
        self._journal.write("withdraw", epoch=self._epoch, version=version)

    def recover(self, sender: Sender) -> bool:
        """Bring a worker that has lost its weights, because it was started again, to the newest version.

        False if it has lost nothing, or cannot be helped: whatever failed there has another reason. To be called in the
        thread that started the workers.
        """
        (member,) = [member for member in self._fleet.members if member.sender is sender]
        if self._unsure or self._replaced:
            self._take_over()
            return member.serves is not None and member.serves == self._newest
        written = self._kept()
        if written is None or not self._rejoined([member]):
            return False
        self._update([member], written)
        return True

    def close(self) -> None:
        """Give up what the backend holds; workers keep their version: `withdraw` it before you train on."""
        self._fleet.close()
        self._fleet = Fleet([], self._timeout_s)
        self._publisher.close()

    # --- who trains these workers, and what they serve ----------------------------------------------------------------

    def _take_over(self, opening: bool = False) -> None:
        """Take the next epoch in all workers, so that no earlier message counts any more, and learn what they serve.

        For a session that opens, and for one of which an update has failed: its own messages may still be on their way.
        """
        members = self._fleet.members
        status, _ = self._fleet.ask(members, "status", {}, CLEAN_UP_S)
        self._replaced = not opening and (self._replaced or any(map(self._is_anothers, status.values())))
        if not self._replaced:
            self._epoch += 1
            failures = self._agree(members)
        if self._replaced:
            raise wire.TransferError(
                f"another trainer has taken over these workers (our epoch was {self._epoch}): "
                "open the transfer again to take them back"
            )
        for failure in failures.values():
            if failure.status == 422:
                raise ValueError(str(failure)) from failure
        again = self._rejoined(list(failures))
        self._raise("agreeing on the weights", {m: f for m, f in failures.items() if m not in again})
        newest = {member: -1 if member.newest is None else member.newest for member in members}
        self._newest = None if highest("version", newest) < 0 else highest("version", newest)
        self._unsure = False
        self._catch_up()

    def _is_anothers(self, status: Mapping[str, Any]) -> bool:
        """Whether the worker obeys a trainer that came after us, or at the same time and was faster."""
        return status["epoch"] > self._epoch or (status["epoch"] == self._epoch and status["trainer"] != self._trainer)

    def _agree(self, members: Sequence[Member]) -> Failures:
        """Tell them what is to be agreed on, then ask what they serve: nobody else can change that any more."""
        info = {"init_info": {"epoch": self._epoch, **self._agreed}}
        _, failures = self._fleet.ask(members, "init_weight_transfer_engine", info)
        self._replaced |= any(failure.status == 409 for failure in failures.values())  # since they told their status
        status, silent = self._fleet.ask([member for member in members if member not in failures], "status", {})
        for member, answer in status.items():
            member.serves, member.newest = answer["version"], answer["newest"]
        return failures | silent

    def _rejoined(self, members: Sequence[Member]) -> list[Member]:
        """Those that were started again meanwhile, or are now, and have agreed on the weights."""
        if not members:
            return []
        status, silent = self._fleet.ask(self._fleet.members, "status", {}, CLEAN_UP_S)
        if any(self._is_anothers(answer) for answer in status.values()):
            return []
        revived = [member for member in members if member in silent and member.sender.restart()]
        status |= self._fleet.ask(revived, "status", {}, CLEAN_UP_S)[0]
        lost = [member for member in members if member in status and status[member]["epoch"] < self._epoch]
        failures = self._agree(lost)
        back = [member for member in lost if member not in failures and not self._replaced]
        for member in back:
            self._restarts += 1
            self._journal.write("rejoin", worker=member.sender.name, epoch=self._epoch)
            LOG.warning("%s was started again and gets the weights anew", member.sender.name)
        return back

    def _catch_up(self) -> None:
        """Bring workers that missed the end of the last update to its version: then no slot but that one is served."""
        behind = [member for member in self._fleet.members if member.serves != self._newest]
        written = self._kept() if behind else None
        if written is not None:
            self._update(behind, written)

    def _kept(self) -> Written | None:
        """The newest version, if its bytes are still there."""
        written = None if self._newest is None else self._writes.get(self._newest)
        if written is None or not self._publisher.keeps:
            return None
        gone = self._broadcaster is not None and not self._broadcaster.holds(written.version)
        return None if gone else written

    # --- one update ---------------------------------------------------------------------------------------------------

    def _withdraw(self, members: Sequence[Member], version: int) -> Failures:
        """Let these workers serve nothing up to `version`; who may go on."""
        answers, failures = self._fleet.ask(members, "withdraw_weights", {"epoch": self._epoch, "version": version})
        for member in answers:
            member.serves = None
            self._viewers.pop(member, None)
        return failures

    def _write(self, weights: Weights, version: int) -> Written:
        served = {member.serves for member in self._fleet.members if member.serves is not None}
        self._writes = {live: self._writes[live] for live in served if live in self._writes}
        if self._fenced is not None:
            self._fenced.fence(self._epoch)
        try:
            where, digest = self._publisher.write(version, weights, served, self.with_digest)
        except (OSError, RuntimeError) as error:  # the latter is torch's, for memory that is not to be had, say
            raise wire.TransferError(f"writing version {version} failed: {error}") from error
        except NotFinite:
            raise self._refused(weights, version) from None
        written = self._writes[version] = Written(version, where, digest)
        self._journal.write("publish", epoch=self._epoch, version=version, digest=digest)
        return written

    def _update(self, members: Sequence[Member], written: Written) -> None:
        """Let these workers take one version: all, or none as far as that can be undone."""
        self._unsure = True
        try:
            self._carry(members, written)
        finally:
            if not self._publisher.exposes:
                self._publisher.release()
        self._unsure = False

    def _carry(self, members: Sequence[Member], written: Written) -> None:
        at_once = len(members) == 1 and is_remote(members[0])
        failures = self._stage(members, written, at_once)
        if again := self._rejoined(list(failures)):
            if self._broadcaster is not None:
                again = list(failures)  # one that dies ends the broadcast for all
            failures = {m: f for m, f in failures.items() if m not in again} | self._stage(again, written, at_once)
        if failures:
            self._abort(members, written.version)
            self._raise(f"{'the update to' if at_once else 'staging'} version {written.version}", failures)
        if not at_once:
            self._finish_all(members, written)

    def _finish_all(self, members: Sequence[Member], written: Written) -> None:
        failures = self._finish(members, written.version)
        if again := self._rejoined(list(failures)):
            later = self._stage(again, written)
            later |= self._finish([member for member in again if member not in later], written.version)
            failures = {m: f for m, f in failures.items() if m not in again} | later
        self._raise(f"finishing version {written.version}", failures)

    def _stage(self, members: Sequence[Member], written: Written, finish: bool = False) -> Failures:
        """Start and update in these workers, in one message where that saves time; with `finish` all three."""
        named = {"epoch": self._epoch, "version": written.version}
        digest = {} if written.digest is None else {"digest": written.digest}
        ahead = {  # only a worker that was started again, and got this number from somebody else
            member: wire.RemoteError(member.sender.name, "status", 409, f"serves version {member.serves}, not from us")
            for member in members
            if member.serves is not None and member.serves >= written.version
        }
        takers = [member for member in members if member not in ahead]
        part, where = None, written.where
        if self._broadcaster is not None and takers:
            part = self._part(written.version, takers)
            where = where | part.where
        messages: list[tuple[str, dict[str, Any]]] = [
            ("start_weight_update", named | digest),
            ("update_weights", {"update_info": {**named, "where": where}}),
        ]
        work = 1
        if all(map(is_remote, takers)):
            work = 2 + finish
            messages = [("start_weight_update", {**named, **digest, "where": where, "finish": finish})]
        if finish:
            self._name(takers, written.version)
        told: dict[str, Any] = {} if part is None else {"alongside": part}
        answers, failures = self._fleet.converse(takers, messages, work=work, **told)
        return ahead | (self._finished(answers, failures, written.version) if finish else failures)

    def _part(self, version: int, takers: Sequence[Member]) -> Part:
        """The trainer's part in a broadcast to these workers."""
        assert self._broadcaster is not None
        try:
            return self._broadcaster.alongside(version, [(self._epoch, id(m), m.boot) for m in takers])
        except (OSError, RuntimeError, ValueError) as error:
            raise wire.TransferError(f"a broadcast of version {version} cannot be set up: {error}") from error

    def _finish(self, members: Sequence[Member], version: int) -> Failures:
        self._name(members, version)
        body = {"epoch": self._epoch, "weight_version": str(version)}
        answers, failures = self._fleet.ask(members, "finish_weight_update", body)
        failures = self._finished(answers, failures, version)
        self._abort(list(failures), version)
        return failures

    def _name(self, members: Sequence[Member], version: int) -> None:
        """Note that these workers are told to finish `version`, and may serve it from now on."""
        self._named = max(self._named, version)
        if self._publisher.exposes:
            self._viewers |= dict.fromkeys(members)

    def _finished(self, answers: Collection[Member], failures: Failures, version: int) -> Failures:
        """Note who serves `version`, also those whose answer was lost; the failures of all others."""
        for member in [*answers, *self._finished_unheard(list(failures), version)]:
            member.serves = version
            failures.pop(member, None)
        return failures

    def _finished_unheard(self, members: Sequence[Member], version: int) -> list[Member]:
        """Which of these workers serve `version`, although their answer was lost."""
        status, _ = self._fleet.ask(members, "status", {}, CLEAN_UP_S)
        ours = [member for member, answer in status.items() if not self._is_anothers(answer)]
        return [m for m in ours if (status[m]["version"], status[m]["epoch"]) == (version, self._epoch)]

    def _abort(self, members: Sequence[Member], version: int) -> None:
        """Give the update up, so that nobody holds a stage until its lease ends; who does not hear it does."""
        self._fleet.ask(members, "abort_weight_update", {"epoch": self._epoch, "version": version}, CLEAN_UP_S)

    def _check(self, weights: Weights, version: int) -> None:
        """TransferError unless the tensors are those agreed on, and finite also in the dtype that travels."""
        known = list(weights) == self._names and same_tensors(weights.values(), self._publisher.given)
        if not known:
            self._check_form(weights, version)
        for entry in self._tied:
            if any(weights[alias].data_ptr() != weights[entry.name].data_ptr() for alias in entry.aliases):
                raise wire.TransferError(f"version {version}: {entry.name} is no longer tied to {entry.aliases}")
        if not self._publisher.finds_nonfinite and not_finite(weights, self._manifest) is not None:
            raise self._refused(weights, version)

    def _check_form(self, weights: Weights, version: int) -> None:
        if weights.keys() != self._manifest.by_name.keys():
            changed = sorted(weights.keys() ^ self._manifest.by_name.keys())
            raise wire.TransferError(f"version {version}: other names than agreed on: {', '.join(changed[:10])}")
        shapes = map(SHAPE, map(weights.__getitem__, self._shapes))  # never all at once: 19,000 new objects wake the gc
        if not all(map(operator.eq, shapes, self._shapes.values())):
            other = next(entry for entry in self._manifest.entries if weights[entry.name].shape != entry.shape)
            raise wire.TransferError(f"version {version}: {other.name} is not the {list(other.shape)} agreed on")

    def _refused(self, weights: Weights, version: int) -> wire.TransferError:
        bad = not_finite(weights, self._manifest)
        return wire.TransferError(f"version {version}: {bad} has values that are not finite; nothing was sent")

    def _raise(self, phase: str, failures: Failures) -> None:
        if failures:
            reasons = "; ".join(str(failure) for failure in failures.values())
            raise wire.TransferError(f"{phase} failed: {reasons}") from next(iter(failures.values()))


def _agreed_dtype(status: Answers) -> torch.dtype | None:
    """The one floating-point dtype of all workers, to cast to; None where their models mix several."""
    wanted = {member.sender.name: answer["dtype"] for member, answer in status.items()}
    if len(set(wanted.values())) > 1:
        raise ValueError(f"all workers must have one dtype, so that the weights can be written once (got {wanted})")
    name = next(iter(wanted.values()))
    return None if name is None else DTYPES[name]
