"""All workers of a session at once: a message to each, in parallel and with a deadline; answers and failures apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from transfer import Sender, wire

ADDRESSED = ("init_weight_transfer_engine", "start_weight_update")  # what all else of an update depends on
GRACE_S = 5.0  # a sender that outlasts its own deadline by this is given up


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
    """The workers behind `senders`; `control_bytes` counts the messages' JSON, both ways."""

    def __init__(self, senders: Sequence[Sender], timeout_s: float) -> None:
        self.members = [Member(sender) for sender in senders]
        self.control_bytes = 0
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(max(1, len(senders)), thread_name_prefix="transfer")

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
    ) -> tuple[dict[Member, list[dict[str, Any]]], Failures]:
        """Several messages, one after the other, to each of these members; the first failure ends that member's."""
        deadline = min(self._timeout_s, timeout_s or self._timeout_s)

        def talk(member: Member) -> list[dict[str, Any]]:
            return [member.sender.call(verb, _addressed(verb, body, member), deadline) for verb, body in messages]

        answers, failures = self._each(members, talk, len(messages) * deadline)
        for member, heard in answers.items():
            said = [_addressed(verb, body, member) for verb, body in messages]
            self.control_bytes += sum(len(json.dumps(each, separators=(",", ":"))) for each in (*said, *heard))
            member.boot = heard[-1].get("boot", member.boot)
        return answers, failures

    def close(self) -> None:
        """Wait for nobody."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _each(
        self, members: Sequence[Member], talk: Callable[[Member], list[dict[str, Any]]], timeout_s: float
    ) -> tuple[dict[Member, list[dict[str, Any]]], Failures]:
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


def _addressed(verb: str, body: Mapping[str, Any], member: Member) -> Mapping[str, Any]:
    """The message, for this start of the worker alone where that counts."""
    return {**body, "boot": member.boot} if member.boot and verb in ADDRESSED else body


def _as_remote(error: BaseException | None, name: str) -> wire.RemoteError:
    if isinstance(error, wire.RemoteError):
        return error
    return wire.RemoteError(name, "call", 0, f"{type(error).__name__}: {error}")
