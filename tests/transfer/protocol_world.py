"""A world for protocol.py: trainers, workers, a bad network between them, and faults in the work.

The trainers are session.py itself (protocol_trainer.py); the workers are states of protocol.py, driven as update.py
drives them (protocol_worker.py); the network is here. It loses messages, doubles them, says them again at any later
time (a lost one that comes again was late), and loses answers; the work fails before, in and after its first write;
leases pass; workers and trainers die and come back. A message goes down with the process that it was sent to. All is
read from bytes, four to a move, and a zero is the quiet choice: what hypothesis shrinks to is a short story.

What every worker must obey, whoever speaks, is in protocol_worker.py. Of sessions, moreover:
- What a worker says is finished (in its answer to `finish`, or in its status if that was lost) is live, byte for byte.
- No slot is written while a worker serves it or has it staged.
- Where workers serve the trainer's own memory, none serves it while it changes, or finishes what has changed since it
  was staged.
- A trainer to which a worker has said that it is another's starts no update until it has opened again.
- When nothing goes wrong any more, every trainer can push, but those that a later one has replaced.

A one-shot trainer speaks, too. It names an update when that is finished, if ever, so of its weights only the number
that they are served under is judged. In half of the worlds a faulty trainer says anything in anybody's name: there
the first two rules do not hold, as a worker cannot tell it from the session.

Epochs live in the workers' memory, so two trainers may hold the same one if all workers were started again in between:
there a world ends.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_trainer import Trainer, replaced_parts
from protocol_worker import LEASE_S, Content, Parcel, Violation, Worker, must

from transfer.agreement.protocol import Abort, Decision, Finish, Init, Message, Phase, Rename, Start, Update, Withdraw
from transfer.config import Verify

BYTES_A_MOVE = 4
MOVES_A_WORLD = 300


def _wheel(quiet: str, shares: dict[str, int]) -> list[str]:
    """256 fields with these shares; the quiet one has the rest, and field 0."""
    others = [name for name, share in shares.items() for _ in range(share)]
    return [quiet] * (256 - len(others)) + others


MOVES = _wheel(
    "rest",
    {
        "trainer speaks": 165,
        "network repeats": 30,
        "faulty trainer speaks": 24,
        "one-shot trainer speaks": 10,
        "time passes": 18,
        "worker dies": 3,
        "trainer dies": 5,
    },
)
FATES = _wheel("arrives", {"doubled": 20, "answer lost": 6, "lost": 6})
SAYS = (Start, Update, Finish, Abort, Start, Update, Finish, Init)
FAULTY = (*SAYS, Start, Withdraw, Finish, Abort, Start, Update, Withdraw, Init)
FAULTS = _wheel("", {"slow": 6, "before": 6, "within": 24, "dies": 2, "dies within": 2})


class KnownLimit(Exception):
    """Two trainers hold the same epoch."""


class World:
    """Workers, up to two trainers and the network between; `tally` counts the transitions and what they were."""

    def __init__(self, choices: bytes, tally: Counter[Any]) -> None:
        self.tally = tally
        self.now = 0.0
        self.coins = 0  # what trainers decide by: bit 0, to open again after a failure; bit 1, to recover a worker
        self.holders: dict[int, str] = {}  # who has started an update under an epoch
        manners, sizes, self._moves = choices[0], choices[1], choices[2:]
        self._faulty_speaks = bool(manners & 1)
        self.verify = Verify.digest if manners & 2 else Verify.off
        self.settled = bool(manners & 4)  # whether workers compare digests when bytes are staged, or when they are live
        self.keeps = bool(manners & 8)  # whether bytes stay in slots
        self.says_it_at_once = bool(manners & 16)  # start, update and, to a single worker, finish in one message
        self.exposes = bool(sizes & 4)  # whether workers serve the trainer's own memory
        self._changed: set[Content] = set()  # what was there before a gradient step
        self.workers = [Worker(self, number) for number in range((2, 3, 1, 2)[sizes & 3])]
        self._trainers: list[Trainer] = []
        self._count = (1, 2, 1, 2, 1, 2, 1, 0)[manners >> 5]
        self._sent: list[Parcel] = []
        self._contents = itertools.count()
        self._names = itertools.count(1)
        self._story: list[tuple[Any, ...]] = []

    def run(self) -> None:
        """Make all the moves; Violation, with the whole story, at the first thing that must not happen."""
        try:
            for _ in range(self._count):
                self._begin()
            for at in range(0, len(self._moves) - BYTES_A_MOVE + 1, BYTES_A_MOVE):
                self._move(*self._moves[at : at + BYTES_A_MOVE])
            self._make_peace()
        except KnownLimit:
            self.tally["known limit"] += 1
        except Violation as violation:
            story = [" ".join(str(part) for part in event if part != "") for event in self._story]
            raise Violation("\n".join([str(violation), *story])) from violation
        finally:
            for trainer in self._trainers:
                trainer.die()

    def publish(self, trainer: str, version: int | None) -> Content:
        """New weights."""
        return Content(trainer, version, f"x{next(self._contents)}")

    def overwrite(self, content: Content | None) -> None:
        """Something else is written where it was."""
        for facts in (worker.facts for worker in self.workers):
            used = {facts.live if facts.whole else None, facts.stage.content if facts.stage else None} - {None}
            must(content not in used or self._faulty_speaks, "a slot was written that a worker serves or has staged")

    def change(self, content: Content) -> None:
        """A trainer takes a gradient step in its own memory, where this was."""
        served = {worker.facts.live for worker in self.workers if worker.facts.whole}
        must(content not in served or self._faulty_speaks, "memory has changed that a worker serves")
        self._changed.add(content)
        self.tally["changed"] += 1
        self._tell(content, "changes")

    def check_unchanged(self, content: Content) -> None:
        """A worker serves this from now on."""
        must(content not in self._changed or self._faulty_speaks, "finished what had changed since it was staged")

    def ask(self, trainer: Trainer, worker: Worker, fate: int) -> dict[str, Any] | int:
        """What a worker says about itself; 0 if that, or the question, is lost."""
        answer = worker.status()
        self._tell(trainer.name, "->", worker.number, "status?", answer)
        if not self._faulty_speaks:
            trainer.learn(worker, None, answer)
        return 0 if "lost" in FATES[fate] else answer

    def send(self, trainer: Trainer, parcel: Parcel, fate: int, fault: int) -> dict[str, Any] | int:
        """The answer, or the HTTP status of a failure, 0 if nothing is heard; the network will remember the message."""
        message, worker = parcel.message, parcel.worker
        if isinstance(message, Start):
            if self.holders.setdefault(message.epoch, trainer.name) != trainer.name:
                raise KnownLimit
            must(not trainer.replaced, "a trainer that was replaced went on")
        self._sent.append(parcel)
        if FATES[fate] == "lost":
            self._tell(trainer.name, "->", worker.number, message, "is lost")
            return 0
        status = self._deliver(parcel, FAULTS[fault], "")
        answer = worker.status()
        if status == 200 and not self._faulty_speaks:
            trainer.learn(worker, message, answer)
        if FATES[fate] == "doubled":
            self._deliver(parcel, "", "doubled")
        if FATES[fate] == "answer lost":
            return 0
        return answer if status == 200 else status

    def loses(self, fate: int) -> bool:
        """Whether a message with this fate never arrives."""
        return FATES[fate] == "lost"

    def count(self, phase: Phase, cause: str, answer: str = "", decision: Decision | None = None) -> None:
        """One more transition, which the worker checks."""
        self.tally["transitions"] += 1
        self.tally[phase.value, cause, answer] += 1
        self._tell("   ", phase.value, cause, decision or "")

    def _move(self, what: int, which: int, how: int, luck: int) -> None:
        self.coins = how
        worker = self.workers[which % len(self.workers)]
        match MOVES[what]:
            case "trainer speaks" if self._trainers:
                self._trainers[-1 if which > 200 else 0].speak(which, how, luck)
            case "network repeats" if self._sent:
                self._deliver(self._sent[-1 - which % len(self._sent)], FAULTS[luck], "once more")
            case "faulty trainer speaks" if self._faulty_speaks:
                torn = [other for other in self.workers if other.facts.torn]
                self._say_anything(torn[0] if torn else worker, how, luck)
            case "one-shot trainer speaks" | "trainer speaks":
                self._update_in_one_shot(worker, how, luck)
            case "time passes":
                self._pass(1.0 + how % int(LEASE_S))
            case "worker dies":
                worker.start()
                self._tell("worker", worker.number, "dies")
            case "trainer dies" if self._trainers:
                self._trainers.pop(which % len(self._trainers)).die()
                self._begin()

    def _begin(self) -> Trainer:
        trainer = Trainer(self, f"trainer {next(self._names)}")
        self._trainers.append(trainer)
        self._tell(trainer.name, "begins")
        return trainer

    def _make_peace(self) -> None:
        """Nothing goes wrong any more."""
        self.coins = 0
        self._tell("peace")
        for trainer in [*self._trainers, self._begin()]:
            enough = trainer.rounds + 3  # the one under way, perhaps one that fails as that did, and one that must work
            while trainer.rounds < enough:
                trainer.speak(0, 0, 0)
            must(trainer.works or trainer.gives_up, f"{trainer.name} cannot push, though nothing goes wrong")
        must(all(worker.facts.live.trainer == trainer.name for worker in self.workers), "a push left a worker out")

    def _deliver(self, parcel: Parcel, fault: str, how: str) -> int:
        self._tell(parcel.sender, "->", parcel.worker.number, parcel.message, how, fault)
        return parcel.worker.receive(parcel, fault)

    def _say_anything(self, worker: Worker, how: int, luck: int) -> None:
        """A message that no trainer should send, or not now, or not under this epoch."""
        facts, stage = worker.facts, worker.facts.stage
        epoch = max(0, facts.epoch + (0, 0, 0, 0, 0, 0, -1, 1)[how >> 5])
        newest = -1 if facts.version is None else facts.version
        near = stage.version if stage else newest + (not facts.torn)
        version = max(0, (near, near, newest, newest + 1, newest + 2, newest - 1, newest, near)[how & 7])
        digest = (None, facts.digest, stage and stage.digest, "z")[luck & 3]
        kind = FAULTY[luck >> 2 & 15]
        if kind is Start:
            message: Message = Start(epoch, version, digest)
        else:
            version = max(0, (newest - 1, newest - 1, newest, near)[luck & 3]) if kind is Withdraw else version
            message = Init(epoch, "faulty") if kind is Init else kind(epoch, version)
        place = ([self.publish("faulty trainer", version if epoch else None)], 0)
        self._deliver(Parcel("faulty trainer", worker, facts, message, place), FAULTS[how], "")

    def _update_in_one_shot(self, worker: Worker, how: int, luck: int) -> None:
        """Part of vLLM's sequence, that names no epoch and no version: one_shot.py finds it, and a label comes last."""
        label = None
        worker = next((other for other in self.workers if other.facts.epoch == 0), worker)
        for kind in (Start, Update, Rename, Finish)[how & 3 :][: 1 + (how >> 2 & 3)]:
            stage, newest = worker.facts.stage, worker.facts.version
            version = stage.version if stage else 0 if newest is None else newest + 1
            if kind is Rename:
                version = label = max(0, version + (luck & 3) - 1)
            elif kind is Finish and label is not None:
                version = label
            place = ([self.publish("one-shot trainer", None)], 0)
            self._sent.append(Parcel("one-shot trainer", worker, worker.facts, kind(0, version), place))
            self._deliver(self._sent[-1], FAULTS[luck], "")

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        self._tell(f"{seconds:g} s pass, it is {self.now:g}")
        for worker in self.workers:
            worker.check()

    def _tell(self, *event: Any) -> None:
        self._story.append((self.now, *event))


def run_worlds(count: int, tally: Counter[Any], **options: Any) -> None:
    """Run `count` worlds and add up what happened in `tally`; `options` are settings of hypothesis."""
    size = 2 + BYTES_A_MOVE * MOVES_A_WORLD

    @settings(max_examples=count, database=None, report_multiple_bugs=False, **options)
    @given(st.binary(min_size=size, max_size=size))
    def run(choices: bytes) -> None:
        World(choices, tally).run()

    with replaced_parts():
        run()
