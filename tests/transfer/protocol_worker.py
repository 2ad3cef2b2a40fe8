"""A worker that is judged: State driven as update.py drives it, against what has really happened to its weights.

`Facts` are kept apart from the protocol's `State`, from the events alone: which trainer was let in, which bytes lie
staged until when, when the first of them was written and the last. After every step the state must agree with them,
the decision must be one that they allow, and what they tell must be in order itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from transfer.agreement import protocol
from transfer.agreement.protocol import (
    Abort,
    Decision,
    Do,
    Event,
    Finish,
    Init,
    Message,
    Phase,
    Refuse,
    Rename,
    Repeat,
    Start,
    State,
    Update,
    Withdraw,
)

if TYPE_CHECKING:
    from protocol_world import World

LEASE_S = 8.0


class Violation(AssertionError):
    """Something that must never happen."""


class Content(NamedTuple):
    """Weights as their trainer published them; two that differ have different digests."""

    trainer: str
    version: int | None  # None: of a one-shot trainer, which names them when it finishes
    digest: str


class Parcel(NamedTuple):
    """A message on its way."""

    sender: str
    worker: Worker
    process: Facts  # of the process that it was sent to
    message: Message
    place: tuple[list[Content | None], int] | None = None  # where Update finds the bytes: some slots, and which of them


@dataclass(slots=True)
class Stage:
    """An update that was started and has not ended."""

    version: int
    digest: str | None
    ends: float  # when, if nothing more is heard from its trainer
    content: Content | None = None
    epoch: int = 0  # of the trainer that staged it


@dataclass(slots=True)
class Facts:
    """What has happened to a worker's process since it started."""

    epoch: int = 0  # of the last trainer that was let in
    trainer: str = ""  # that one
    stage: Stage | None = None
    version: int | None = None  # finished last
    digest: str | None = None  # of `version`, as it was told
    live: Content | None = None
    torn: bool = False
    withdrawn: int | None = None  # the highest version, by the trainer of this epoch
    done: list[int | None] = field(default_factory=list)  # as they went live; None: broke off, or was withdrawn

    @property
    def whole(self) -> bool:
        """Whether there are weights, all of one version."""
        return self.live is not None and not self.torn


def must(holds: bool, sentence: str) -> None:
    """Violation unless `holds`."""
    if not holds:
        raise Violation(sentence)


# --- what a worker may answer -----------------------------------------------------------------------------------------


def allowed(facts: Facts, message: Message) -> tuple[type[Decision], ...]:
    """The decisions that are right, after what has happened."""
    if isinstance(message, Init):
        again = (message.epoch, message.trainer) == (facts.epoch, facts.trainer)
        return (Repeat,) if again else (Do,) if message.epoch > facts.epoch else (Refuse,)
    if message.epoch != facts.epoch:
        return (Refuse,)
    if isinstance(message, Withdraw):
        return (_allowed_withdrawal(facts, message),)
    if isinstance(message, Start | Rename) and facts.withdrawn is not None and message.version <= facts.withdrawn:
        return (Refuse,)
    if facts.stage is None:
        return (_allowed_at_rest(facts, message),)
    return _allowed_while_staging(facts, facts.stage, message)


def _allowed_withdrawal(facts: Facts, message: Withdraw) -> type[Decision]:
    if facts.version is not None and message.version < facts.version:
        return Repeat
    known = facts.withdrawn is not None and message.version <= facts.withdrawn
    return Repeat if known and not facts.whole else Do


def _allowed_at_rest(facts: Facts, message: Message) -> type[Decision]:
    live = facts.whole and message.version == facts.version
    match message:
        case Start():
            if facts.version is None or message.version > facts.version:
                return Do
            if message.version < facts.version or message.digest != facts.digest:
                return Refuse
            return Repeat if facts.whole else Do
        case Abort():
            return Refuse if live else Repeat
    return Repeat if live else Refuse


def _allowed_while_staging(facts: Facts, stage: Stage, message: Message) -> tuple[type[Decision], ...]:
    if isinstance(message, Rename):
        return (Do,) if facts.version is None or message.version > facts.version else (Refuse,)
    live = facts.whole and message.version == facts.version
    if message.version != stage.version:
        if isinstance(message, Abort):
            return (Refuse,) if live else (Repeat,)
        return (Refuse, Repeat) if live else (Refuse,)
    match message:
        case Start():
            return (Repeat,) if message.digest == stage.digest else (Refuse,)
        case Finish():
            return (Do,) if stage.content is not None else (Refuse,)
    return (Do,)


# --- a worker ---------------------------------------------------------------------------------------------------------


class Worker:
    """A State, driven as update.py drives it, and the facts that it is held against after every step."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.start()

    def start(self) -> None:
        """A new process: nothing is known, nothing is served."""
        self.state = State()
        self.facts = Facts()
        self.check()

    def status(self) -> dict[str, int | str | None]:
        """What it says about itself."""
        state = protocol.expired(self.state, self.world.now)
        return {"epoch": state.epoch, "trainer": state.trainer, "version": state.serves, "newest": state.version}

    def receive(self, parcel: Parcel, fault: str = "") -> int:
        """Carry a message out, with a fault in the work; the answer's HTTP status, 0 if there is nobody to give one."""
        if parcel.process is not self.facts:
            return 0  # a message goes down with the process that it was sent to
        self._lapse()
        state, decision = self._step(parcel.message)
        done = not isinstance(decision, Refuse)
        if isinstance(decision, Do):
            done = self._carry_out(parcel, state, fault)
        elif done and isinstance(parcel.message, Start | Abort | Rename | Withdraw):  # other repeats store nothing
            self.state = state
            self._renew()
        self.check()
        if done:
            self._check_answer(parcel)
            return 200
        if isinstance(decision, Refuse):
            return 409
        return 500 if parcel.process is self.facts else 0

    def check(self) -> None:
        """Hold the state against the facts."""
        facts = self.facts
        self._lapse()
        state = protocol.expired(self.state, self.world.now)
        serves = state.serves
        if serves is not None:
            must(not facts.torn, "served weights that are torn or withdrawn")
            must(facts.withdrawn is None, "serves although its version, or a newer one, was withdrawn")
            must(facts.live is not None, "served before its first finish")
            must(facts.live.version in (serves, None) and serves == facts.version, "served under a wrong name")
        must((serves is not None) == facts.whole, "stopped serving weights that are whole")
        must((state.version, state.digest) == (facts.version, facts.digest), "forgot what was finished last")
        must(state.epoch == facts.epoch, "has another epoch than the trainer it let in")
        self._check_stage(state)

    def _lapse(self) -> None:
        if self.facts.stage is not None and self.world.now >= self.facts.stage.ends:
            self.facts.stage = None
            self.world.tally["lease ended"] += 1

    def _check_stage(self, state: State) -> None:
        facts, stage = self.facts, self.facts.stage
        if stage is None:
            must(state.target is None and not state.staged, "a stage outlived its trainer's lease, abort or failure")
        else:
            must(state.target == stage.version, "a stage was lost, or has another name, though its lease runs")
            must(state.target_digest == stage.digest, "the digest of the stage was lost")
            must(state.staged == (stage.content is not None), "whether weights were staged was mistaken")
        if facts.torn:
            phase = Phase.QUARANTINED
        elif stage is not None:
            phase = Phase.STAGING
        else:
            phase = Phase.EMPTY if facts.live is None else Phase.READY
        must(state.phase is phase, "stands in another phase than it says")

    def _step(self, message: Message) -> tuple[State, Decision]:
        facts, now = self.facts, self.world.now
        before = protocol.expired(self.state, now)
        after, decision = protocol.step(self.state, message, now, LEASE_S)
        fenced = not isinstance(message, Init) and message.epoch != facts.epoch
        answer = "fenced" if fenced else type(decision).__name__
        self.world.count(before.phase, type(message).__name__, answer, decision)
        right = allowed(facts, message)
        if type(decision) not in right:
            wanted = " or ".join(kind.__name__ for kind in right)
            raise Violation(f"{decision} for {message}, where only {wanted} is right")
        if isinstance(decision, Refuse):
            must(after == before, "a message that was refused changed something")
        elif isinstance(decision, Repeat):
            must(replace(after, deadline=before.deadline) == before, "a repeat changed more than the lease")
        return after, decision

    def _carry_out(self, parcel: Parcel, state: State, fault: str) -> bool:
        facts, message = self.facts, parcel.message
        match message:
            case Init():
                if fault == "before":
                    return False  # could not agree: nothing has happened
                facts.epoch, facts.trainer, facts.stage = message.epoch, message.trainer, None
                facts.withdrawn = None
            case Start():
                facts.stage = Stage(message.version, message.digest, 0.0)
            case Update():
                return self._stage(parcel, state, fault)
            case Finish():
                return self._replace(parcel, fault)
            case Abort():
                facts.stage = None
            case Rename():
                facts.stage.version = message.version
            case Withdraw() if fault in ("before", "dies"):
                return self._failed_to_withdraw(fault)
            case Withdraw():
                self._withdraw(message.version)
        self.state = state
        self._renew()
        return True

    def _failed_to_withdraw(self, fault: str) -> bool:
        """Somebody goes on generating, or the process ends."""
        if fault == "dies":
            self.start()
        return False

    def _withdraw(self, version: int) -> None:
        facts = self.facts
        if facts.whole:
            facts.done.append(None)
        facts.torn = facts.torn or facts.version is not None
        facts.withdrawn = max(version, version if facts.withdrawn is None else facts.withdrawn)
        if facts.stage is not None and facts.stage.version <= version:
            facts.stage = None

    def _renew(self) -> None:
        if self.facts.stage is not None:
            self.facts.stage.ends = self.world.now + LEASE_S

    def _stage(self, parcel: Parcel, state: State, fault: str) -> bool:
        arrived, stage = self.world.now, self.facts.stage
        slots, slot = parcel.place
        content = slots[slot]
        if fault in ("before", "dies") or (self.world.settled and not _verified(content, stage.digest)):
            return self._failed(fault)
        if fault == "slow":
            self.world.now += LEASE_S / 2
        self.state = state
        stage.content, stage.epoch, stage.ends = content, parcel.message.epoch, arrived + LEASE_S
        return True

    def _replace(self, parcel: Parcel, fault: str) -> bool:
        """Make the staged weights live, with all the events of update.py; `fault` says how far it comes."""
        facts, version = self.facts, parcel.message.version
        if fault == "slow":  # somebody goes on generating, and the lease ends meanwhile
            self.world.now += LEASE_S
        elif fault in ("before", "dies"):
            return self._failed(fault)
        content, digest = facts.stage.content, facts.stage.digest
        must(facts.stage.epoch == facts.epoch, "finished what another trainer had staged")
        must(content.version in (version, None), "finished another version than was staged")
        self._report(Event.WRITING)
        facts.torn = True
        facts.done.append(None)
        must(self.state.serves is None and self.status()["version"] is None, "served while weights were replaced")
        must(self.state.phase is Phase.QUARANTINED, "was not in quarantine while weights were replaced")
        if fault in ("within", "dies within") or not _verified(content, digest):
            self.world.tally["torn"] += 1
            return self._failed(fault)
        self._report(Event.FLIPPED)
        facts.done.pop()
        self._check_order(version)
        self.world.check_unchanged(content)
        facts.stage, facts.torn, facts.withdrawn = None, False, None
        facts.version, facts.digest, facts.live = version, digest, content
        facts.done.append(version)
        return True

    def _check_order(self, version: int) -> None:
        done = self.facts.done
        finished = [v for v in done if v is not None]
        must(not finished or version >= finished[-1], "the version went down")
        must(version not in finished or done[-1] is None, "a version was applied twice")

    def _failed(self, fault: str) -> bool:
        if fault.startswith("dies"):
            self.start()
        else:
            self._report(Event.FAILED)
            self.facts.stage = None
        return False

    def _report(self, event: Event) -> None:
        phase = self.state.phase
        self.state = protocol.reported(self.state, event)
        self.world.count(phase, event.value)

    def _check_answer(self, parcel: Parcel) -> None:
        """What a trainer may conclude from an answer that is no error."""
        match parcel.message:
            case Finish(version=version):
                must(self.state.serves == version, "an acknowledged finish is not live")
            case Abort(version=version):
                must(self.state.serves != version, "the abort of a live version was confirmed")
            case Withdraw(version=version):
                serves = self.state.serves
                must(serves is None or serves > version, "a version that was withdrawn is served on")


def _verified(content: Content, digest: str | None) -> bool:
    return digest in (None, content.digest)
