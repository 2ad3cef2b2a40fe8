"""One worker's side of the weight update, as a pure state machine: versions, epochs, fencing; no I/O, no clock.

    EMPTY or READY(v) --start(w)--> STAGING(v -> w) --update(w)--> the same, staged --finish(w)--> READY(w)
    STAGING --abort(w) | lease expired | failed | init(higher epoch)--> READY(v), or EMPTY; never a mixture
    finish(w) --writing--> QUARANTINED --flipped--> READY(w); an error in between: stays QUARANTINED, serves nothing
    READY --withdraw(v)--> QUARANTINED, and whatever was staged of v or older is dropped
    QUARANTINED --start(w), update(w), finish(w)--> READY(w)

- Epochs fence trainers. `init` must take a higher epoch than any before (409 otherwise, also for the same one from
  another trainer: two that start together must not both win; from the same trainer it is a repeat); every other message
  must carry the epoch of the last `init` (409).
- Versions are monotonic: `start` below the newest finished version is refused (409). A message about the newest version
  is a repeat if its digest is the same: answered, and nothing happens; with another digest it is a conflict (409).
- Only `finish` changes what is served, and only if that very version was staged. `withdraw` ends it: the memory of that
  version and older ones is about to change, so that none of them may be started again in that epoch, whatever its
  digest: the next `init` ends all messages about them. A `withdraw` that comes late, when a newer version is finished,
  changes nothing.
- No message takes a number further than AHEAD beyond the last one: after a version or an epoch that was said by
  mistake, or by somebody else, there is a next one.
- A stage holds for a lease that every message of its trainer renews; after it the stage is as if it had been aborted.

`step` says what a message means in a state: Do (with the state that holds once the work is done), Repeat, or Refuse.
The caller does the work and tells `reported` how it went; `finish` has these events in place of a next state.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

AHEAD = 2**32  # how far a version or an epoch may be beyond the last: more than any trainer will have sent


class Phase(enum.Enum):
    """Where a worker stands."""

    EMPTY = "empty"  # no weights from any trainer yet; serves nothing
    READY = "ready"  # serves a version
    STAGING = "staging"  # an update is under way; goes on serving what it served
    QUARANTINED = "quarantined"  # an update broke off while weights were being replaced, or they were withdrawn


@dataclass(frozen=True, slots=True)
class State:
    """What a worker knows; `version` is the newest finished one, and still there unless `torn` or withdrawn."""

    epoch: int = 0
    trainer: str = ""  # who has taken that epoch
    version: int | None = None
    digest: str | None = None  # of `version`, as its trainer gave it
    torn: bool = False
    withdrawn: int | None = None  # in this epoch; the highest version whose memory may have changed
    target: int | None = None  # the version being staged
    target_digest: str | None = None
    staged: bool = False  # an update of `target` has arrived
    deadline: float = 0.0  # when the lease of `target` ends, in the caller's clock

    @property
    def phase(self) -> Phase:
        """The name of this state."""
        if self.torn:
            return Phase.QUARANTINED
        if self.target is not None:
            return Phase.STAGING
        return Phase.EMPTY if self.version is None else Phase.READY

    @property
    def serves(self) -> int | None:
        """The version that completions are sampled with; None if nothing may be served."""
        return None if self.torn else self.version

    def is_withdrawn(self, version: int) -> bool:
        """Whether the memory of this version may have changed since it was published."""
        return self.withdrawn is not None and version <= self.withdrawn

    def is_far(self, version: int) -> bool:
        """Whether no trainer can have come to this version since those that are known here."""
        known = [each for each in (self.version, self.target, self.withdrawn) if each is not None]
        return version > max(known, default=0) + AHEAD


@dataclass(frozen=True, slots=True)
class Init:
    """A trainer takes over."""

    epoch: int
    trainer: str


@dataclass(frozen=True, slots=True)
class Start:
    """An update to `version` begins."""

    epoch: int
    version: int
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """The bytes of `version` are to be staged."""

    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class Finish:
    """`version` is to become the live one."""

    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class Abort:
    """The update to `version` is given up."""

    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class Rename:
    """The update under way is called `version` from now on: a one-shot trainer says so only when it finishes."""

    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The memory of `version` and older ones is about to change: nothing is served until a newer one is finished."""

    epoch: int
    version: int


class Event(enum.Enum):
    """What the caller reports about the work itself."""

    WRITING = "writing"  # the first weight is about to be replaced
    FLIPPED = "flipped"  # all are
    FAILED = "failed"  # staging or replacing raised an error


Message = Init | Start | Update | Finish | Abort | Rename | Withdraw


@dataclass(frozen=True, slots=True)
class Do:
    """Carry the message out; if that works, the new state holds."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """Answer as before, change nothing."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """409, for this reason; change nothing."""

    reason: str


Decision = Do | Repeat | Refuse


def step(state: State, message: Message, now: float, lease_s: float) -> tuple[State, Decision]:
    """What `message` means at time `now`: the next state and what to do; a stage lives `lease_s` seconds from now."""
    state = expired(state, now)
    if isinstance(message, Init):
        return _init(state, message)
    if message.epoch != state.epoch:
        word = "an older trainer's" if message.epoch < state.epoch else "not initialised here"
        return state, Refuse(f"epoch {message.epoch} is {word}; this worker's trainer has epoch {state.epoch}")
    match message:
        case Start():
            after, decision = _start(state, message)
        case Update():
            after, decision = _update(state, message)
        case Finish():
            after, decision = _finish(state, message)
        case Abort():
            after, decision = _abort(state, message)
        case Rename():
            after, decision = _rename(state, message)
        case Withdraw():
            after, decision = _withdraw(state, message)
    if after.target is not None and not isinstance(decision, Refuse):
        after = replace(after, deadline=now + lease_s)
    return after, decision


def expired(state: State, now: float) -> State:
    """The state at time `now`: a stage whose lease has ended is dropped."""
    return _dropped(state) if state.target is not None and now >= state.deadline else state


def reported(state: State, event: Event) -> State:
    """The state after an event of the work itself."""
    match event:
        case Event.WRITING:
            assert state.staged
            return replace(state, torn=True)
        case Event.FLIPPED:
            assert state.torn and state.staged
            return State(epoch=state.epoch, trainer=state.trainer, version=state.target, digest=state.target_digest)
        case Event.FAILED:
            return _dropped(state)


def _dropped(state: State) -> State:
    return replace(state, target=None, target_digest=None, staged=False, deadline=0.0)


def _init(state: State, message: Init) -> tuple[State, Decision]:
    if (message.epoch, message.trainer) == (state.epoch, state.trainer):
        return state, Repeat()
    if message.epoch <= state.epoch:
        return state, Refuse(f"epoch {message.epoch} is taken; the next trainer's is at least {state.epoch + 1}")
    if message.epoch > state.epoch + AHEAD:
        return state, Refuse(f"epoch {message.epoch} is too far beyond {state.epoch}: at most {AHEAD} are left out")
    return replace(_dropped(state), epoch=message.epoch, trainer=message.trainer, withdrawn=None), Do()


def _start(state: State, message: Start) -> tuple[State, Decision]:
    if state.target is not None:
        if message.version != state.target:
            return state, Refuse(f"version {state.target} is being staged; abort it before starting {message.version}")
        return state, _repeat_if(message.digest == state.target_digest, message.version)
    if state.version is not None and message.version < state.version:
        return state, Refuse(f"version {message.version} is older than {state.version}, which is here already")
    if state.is_withdrawn(message.version):
        return state, Refuse(f"version {message.version} was withdrawn: its memory has changed since")
    if state.is_far(message.version):
        return state, _too_far(message.version)
    same = message.digest == state.digest
    if message.version == state.version and not (same and state.torn):  # torn weights may come again, but no others
        return state, _repeat_if(same, message.version)
    return replace(state, target=message.version, target_digest=message.digest), Do()


def _update(state: State, message: Update) -> tuple[State, Decision]:
    if state.target == message.version:
        return replace(state, staged=True), Do()
    return state, _not_under_way(state, message.version, "staged")


def _finish(state: State, message: Finish) -> tuple[State, Decision]:
    if state.target != message.version:
        return state, _not_under_way(state, message.version, "finished")
    if not state.staged:
        return state, Refuse(f"version {message.version} cannot be finished: none of its weights were staged")
    return state, Do()


def _abort(state: State, message: Abort) -> tuple[State, Decision]:
    if state.target == message.version:
        return _dropped(state), Do()
    if _is_live(state, message.version):
        return state, Refuse(f"version {message.version} is live already and cannot be aborted")
    return state, Repeat()


def _rename(state: State, message: Rename) -> tuple[State, Decision]:
    if state.target is None:
        return state, _not_under_way(state, message.version, "finished")
    if state.version is not None and message.version <= state.version:
        return state, Refuse(f"version {message.version} is not newer than {state.version}, which is here already")
    if state.is_withdrawn(message.version):
        return state, Refuse(f"version {message.version} was withdrawn: its memory has changed since")
    if state.is_far(message.version):
        return state, _too_far(message.version)
    return replace(state, target=message.version), Do()


def _withdraw(state: State, message: Withdraw) -> tuple[State, Decision]:
    if state.version is not None and message.version < state.version:
        return state, Repeat()
    if state.is_far(message.version):
        return state, _too_far(message.version)
    stale = state.target is not None and state.target <= message.version
    after = replace(
        _dropped(state) if stale else state,
        torn=state.torn or state.version is not None,
        withdrawn=max(message.version, message.version if state.withdrawn is None else state.withdrawn),
    )
    return after, Repeat() if after == state else Do()


def _too_far(version: int) -> Decision:
    return Refuse(f"version {version} is too far beyond all that this worker knows of: at most {AHEAD} are left out")


def _is_live(state: State, version: int) -> bool:
    return state.version == version and not state.torn


def _repeat_if(same: bool, version: int) -> Decision:
    return Repeat() if same else Refuse(f"version {version} is here with another digest")


def _not_under_way(state: State, version: int, verb: str) -> Decision:
    if state.target is None and _is_live(state, version):
        return Repeat()
    under_way = "no update is under way" if state.target is None else f"the update to {state.target} is under way"
    return Refuse(f"version {version} cannot be {verb}: {under_way}")
