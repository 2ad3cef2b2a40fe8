"""All workers of a session at once: a message to each, in parallel and with a deadline; answers and failures apart.

What each of them serves, as it was told last, is noted here; what a message means, and when it is sent, is not decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from transfer.agreement import wire
from transfer.backends.base import Alongside
from transfer.trainer.answers import complete
from transfer.trainer.interfaces import Sender

ADDRESSED = ("init_weight_transfer_engine", "start_weight_update")  # what all else of an update depends on
CLEAN_UP_S = 5.0  # deadline of abort and of questions after a failure: the worker may be gone
GRACE_S = 5.0  # a sender that outlasts its own deadline by this is given up, unless it says that it never does


@dataclass(eq=False)
class Member:
    """One worker."""

    sender: Sender
    serves: int | None = None  # the version, as it was told last; None: nothing
    boot: str = ""  # which start of the worker answered last: what is meant for it must not reach another
    newest: int | None = None  # the version that it finished last; is served unless it was torn since


Answers = dict[Member, dict[str, Any]]
Failures = dict[Member, wire.RemoteError]


class Fleet:
    """The workers behind the senders that it was given last; `messages` are those said and heard since."""

    def __init__(self, timeout_s: float) -> None:
        self.members: list[Member] = []
        self.messages: list[Mapping[str, Any]] = []
        self._timeout_s = timeout_s
        self._pool = _threads(0)

    def reach(self, senders: Sequence[Sender]) -> None:
        """Talk to the workers behind these from now on, to no other, and wait for nobody."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.members, self.messages = [Member(sender) for sender in senders], []
        self._pool = _threads(len(senders))

    def regroup(self, members: Sequence[Member]) -> None:
        """Go on with these, of whom some are new or some others are gone: what is noted of each of them stays."""
        self._pool.shutdown(wait=False)
        self.members, self._pool = list(members), _threads(len(members))

    def member(self, sender: Sender) -> Member | None:
        """The one behind this sender; None of one that has left."""
        return next((member for member in self.members if member.sender is sender), None)

    @property
    def served(self) -> set[int]:
        """The versions that some worker serves."""
        return {member.serves for member in self.members if member.serves is not None}

    def ask(
        self, members: Sequence[Member], verb: str, body: Mapping[str, Any], timeout_s: float | None = None
    ) -> tuple[Answers, Failures]:
        """One message to these members: their answers, and who gave none."""
        answers, failures = self.converse(members, [(verb, body)], timeout_s)
        return {member: said[0] for member, said in answers.items()}, failures

    def converse(
        self,
        members: Sequence[Member],
        messages: Sequence[tuple[str, Mapping[str, Any]]],
        timeout_s: float | None = None,
        alongside: Alongside | None = None,
        work: int = 1,
    ) -> tuple[dict[Member, list[dict[str, Any]]], Failures]:
        """Several messages, one after the other, to each of these members; the first failure ends that member's.

        `alongside` runs meanwhile: if it fails all members have, and it is given up as soon as one of them fails.
        `work`: how many verbs each message stands for, with as many deadlines.
        """
        deadline = work * min(self._timeout_s, timeout_s or self._timeout_s)

        def talk(member: Member) -> list[dict[str, Any]]:
            try:
                return [_said(member, verb, body, deadline) for verb, body in messages]
            except BaseException:
                if alongside is not None:
                    alongside.give_up()
                raise

        ours = None if alongside is None else self._pool.submit(alongside.run, deadline / work)
        answers, failures = self._each(members, talk, len(messages) * deadline)
        if ours is not None and alongside is not None:
            failures |= _with_ours(ours, answers, failures, messages[-1][0])
            if not ours.done():  # stuck, or waits for a thread that is
                ours.cancel()
                alongside.give_up()
        for member, heard in answers.items():
            said: list[Mapping[str, Any]] = [_addressed(verb, body, member) for verb, body in messages]
            self.messages += [*said, *heard]
            member.boot = heard[-1].get("boot", member.boot)
        return answers, failures

    def _each(
        self, members: Sequence[Member], talk: Callable[[Member], list[dict[str, Any]]], timeout_s: float
    ) -> tuple[dict[Member, list[dict[str, Any]]], Failures]:
        if len(members) == 1 and is_remote(members[0]):  # in this thread: waking another takes as long as a message
            return _talked(talk, members[0])
        jobs = {member: self._pool.submit(talk, member) for member in members}
        wait(jobs.values(), timeout=timeout_s + GRACE_S)
        answers: dict[Member, list[dict[str, Any]]] = {}
        failures: Failures = {}
        for member, job in jobs.items():
            if not job.done():
                failures[member] = wire.RemoteError(member.sender.name, "call", 0, "its sender does not come back")
            elif job.exception() is None:
                answers[member] = job.result()
            else:
                failures[member] = _as_remote(job.exception(), member.sender.name)
        return answers, failures


def raise_for(phase: str, failures: Failures) -> None:
    """TransferError with the reasons of all, if there is any."""
    if failures:
        reasons = "; ".join(str(failure) for failure in failures.values())
        raise wire.TransferError(f"{phase} failed: {reasons}") from next(iter(failures.values()))


def is_remote(member: Member) -> bool:
    """Whether a message to this worker takes time, and its sender returns by the deadline."""
    return getattr(member.sender, "remote", False)


def _threads(workers: int) -> ThreadPoolExecutor:
    """One a worker, and one for the trainer's own part; none is started before it has something to do."""
    return ThreadPoolExecutor(workers + 1, thread_name_prefix="transfer")


def _talked(
    talk: Callable[[Member], list[dict[str, Any]]], member: Member
) -> tuple[dict[Member, list[dict[str, Any]]], Failures]:
    """One member's answers, or its failure."""
    try:
        return {member: talk(member)}, {}
    except Exception as error:
        return {}, {member: _as_remote(error, member.sender.name)}


def _with_ours(ours: Future[None], answers: dict[Member, Any], failures: Failures, verb: str) -> Failures:
    """What becomes a failure, or another one, as the trainer's own part has failed for a reason of its own."""
    wait([ours], timeout=GRACE_S)
    error = ours.exception() if ours.done() else TimeoutError("it does not come back")
    if error is None or (failures and isinstance(error, ConnectionAbortedError)):  # given up, because others failed
        return {}
    why = f"the trainer's part failed: {error}"
    left = {member: wire.RemoteError(member.sender.name, verb, 0, why) for member in answers}
    answers.clear()
    for member, failure in list(failures.items())[:1]:
        left[member] = wire.RemoteError(failure.worker, failure.verb, failure.status, f"{failure.reason} [{why}]")
    return left


def _said(member: Member, verb: str, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    answer = member.sender.call(verb, _addressed(verb, body, member), timeout_s)
    return complete(member.sender.name, verb, answer)


def _addressed(verb: str, body: Mapping[str, Any], member: Member) -> Mapping[str, Any]:
    """The message, for this start of the worker alone where that counts."""
    return {**body, "boot": member.boot} if member.boot and verb in ADDRESSED else body


def _as_remote(error: BaseException | None, name: str) -> wire.RemoteError:
    if isinstance(error, wire.RemoteError):
        return error
    return wire.RemoteError(name, "call", 0, f"{type(error).__name__}: {error}")
