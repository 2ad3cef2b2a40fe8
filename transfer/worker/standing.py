"""Where a worker stands: the state that protocol.py decides about, what was agreed with the trainer, and whose turn.

Whoever holds `alone` may change the state; anybody may read it at any time.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transfer.agreement import protocol, wire
from transfer.agreement.journal import Journal
from transfer.config import InFlight, Verify
from transfer.worker import lease

TIMEOUT_S = 60.0  # deadline of one message, until a trainer names its own

Noted = protocol.Start | protocol.Update | protocol.Finish | protocol.Withdraw


@dataclass(frozen=True, slots=True)
class Terms:
    """What was agreed with the trainer, besides the weights."""

    timeout_s: float = TIMEOUT_S  # deadline of one message
    verify: Verify = Verify.off  # what is compared with the digest that `start` brings
    in_flight: InFlight = InFlight.wait  # what becomes of completions that run when `finish` comes

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Terms:
        """Those of an `init_info`."""
        in_flight = InFlight(info.get("in_flight", "wait"))
        return cls(float(info["timeout_s"]), Verify(info.get("verify", "off")), in_flight)


class Standing:
    """The state of one start of a worker, named `boot`; `journal` notes how it came there."""

    def __init__(self, journal: Journal) -> None:
        self.state = protocol.State()
        self.terms = Terms()
        self.boot = secrets.token_hex(4)
        self.journal = journal
        self._verbs = threading.Lock()  # one verb at a time

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold while a verb is carried out; Refused 503 if another one takes longer than a message's deadline."""
        timeout_s = self.terms.timeout_s
        if not self._verbs.acquire(timeout=timeout_s):
            raise wire.Refused(503, f"another weight-update message has kept this worker for {timeout_s:g} s")
        try:
            yield
        finally:
            self._verbs.release()

    @property
    def busy(self) -> bool:
        """Whether a verb is being carried out."""
        return self._verbs.locked()

    def now(self) -> protocol.State:
        """The state without a stage whose lease has ended."""
        return protocol.expired(self.state, lease.now())

    def serves(self) -> int:
        """The version that completions are sampled with; Refused 503 if nothing may be served."""
        version = self.state.serves
        if version is None:
            raise wire.Refused(503, f"no weights to serve: this worker is {self.state.phase.value}")
        return version

    def step(self, message: protocol.Message) -> tuple[protocol.State, protocol.Decision]:
        """The state that holds once the message is carried out, and whether it is to be; Refused 409 if not."""
        state, decision = protocol.step(self.state, message, lease.now(), 2 * self.terms.timeout_s)
        if isinstance(decision, protocol.Refuse):
            raise wire.Refused(409, decision.reason)
        return state, decision

    def reported(self, event: protocol.Event) -> None:
        """Go on after an event of the work itself."""
        self.state = protocol.reported(self.state, event)

    def noted(self, op: str, message: Noted, decision: protocol.Decision) -> None:
        """Note in the journal that a message was carried out, or came again."""
        result = "done" if isinstance(decision, protocol.Do) else "repeat"
        digest = self.state.digest if op in ("finish", "withdraw") else self.state.target_digest
        self.journal.write(op, epoch=message.epoch, version=message.version, digest=digest, result=result)
