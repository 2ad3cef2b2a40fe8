"""One row's calls: who may make them, how many, and what came of them."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from rlhf.episodes.loop import SAMPLES
from rlhf.gateway.turns import Turns
from rlhf.rollout.sampling import seed_of
from transfer.agreement.wire import Refused
from transfer.worker.bearer import Bearer

MALFORMED, CALLS = "tools/malformed", "agent/calls"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a session may ask for, until its end."""

    calls: int = 256
    tokens: int = 2**22  # of prompts and answers
    nbytes: int = 256 * 2**20  # of requests


@dataclass(frozen=True, slots=True)
class Terms:
    """How a session samples."""

    seed: int  # of the prompt
    sample: int  # which of the prompt's samples it is
    temperature: float
    allowed: tuple[float, ...]  # temperatures that a request may name


@dataclass(slots=True)
class Session:
    """A row's; several of its requests may be under way."""

    id: str
    terms: Terms
    bounds: Bounds
    deadline: float  # monotonic
    turns: Turns = field(default_factory=Turns)
    lock: threading.Lock = field(default_factory=threading.Lock)  # of all that follows
    reward: float | None = None
    rewarded: bool = False
    closed: bool = False
    calls: int = 0
    tokens: int = 0
    nbytes: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def admit(self, nbytes: int) -> int:
        """The number of another call with a body of so many bytes; Refused 400 if there is to be none."""
        with self.lock:
            if self.closed or self.rewarded:
                raise Refused(400, "the session has ended: its reward is there")
            if self.calls >= self.bounds.calls:
                raise Refused(400, f"the session has made its {self.bounds.calls} calls (task.calls)")
            self.nbytes += nbytes
            if self.nbytes > self.bounds.nbytes:
                raise Refused(400, f"the session has sent more than {self.bounds.nbytes} bytes")
            self.calls += 1
            return self.calls - 1

    def take(self, tokens: int) -> None:
        """Refused 400 if so many more tokens are too many; those that were not used are given back by a second call."""
        with self.lock:
            if tokens > 0 and self.tokens + tokens > self.bounds.tokens:
                raise Refused(400, f"the session has used up its {self.bounds.tokens} tokens of prompts and answers")
            self.tokens += tokens

    def seed(self, call: int, n: int, given: int | None) -> tuple[int, int]:
        """The seed of a call's answers, and the number of the first sample: the row's own at its first call."""
        if given is not None:
            return seed_of(seed_of(self.terms.seed, self.terms.sample), given % 2**63), 0
        if call == 0 and n == 1:
            return self.terms.seed, self.terms.sample
        return seed_of(self.terms.seed, call * SAMPLES + self.terms.sample), 0

    def end(self, reward: float | None) -> None:
        """Its reward; Refused 409 if it has one."""
        with self.lock:
            if self.closed or self.rewarded:
                raise Refused(409, "the session has its reward already")
            self.reward, self.rewarded = reward, True


class Sessions(Bearer):
    """Those that there are, by their keys, of which only digests are kept."""

    def __init__(self) -> None:
        super().__init__(secrets.token_hex(32))
        self._by_key: dict[bytes, Session] = {}

    def begin(self, terms: Terms, bounds: Bounds, within_s: float) -> tuple[Session, str]:
        """Another session, which lasts so long at most, and its key."""
        session = Session(secrets.token_hex(16), terms, bounds, time.monotonic() + within_s)
        key = f"rlhf-{secrets.token_hex(32)}"
        self._by_key[_digest(key.encode())] = session
        return session, key

    def close(self, session: Session) -> None:
        """Nothing more is asked of it."""
        with session.lock:
            session.closed = True
        for key in [key for key, each in self._by_key.items() if each is session]:
            del self._by_key[key]

    def of(self, given: list[bytes]) -> Session | None:
        """Whose key a request with these Authorization headers has shown; None: nobody's."""
        if len(given) != 1 or not given[0].startswith(b"Bearer "):
            return None
        session = self._by_key.get(_digest(given[0].removeprefix(b"Bearer ")))
        return None if session is None or session.closed or session.deadline < time.monotonic() else session

    def allows(self, given: list[bytes]) -> bool:
        """Whether a request with these Authorization headers may call."""
        return self.of(given) is not None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
