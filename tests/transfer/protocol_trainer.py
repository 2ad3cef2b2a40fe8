"""A trainer in the world of protocol_world.py: session.py itself; replaced are the parts that talk and move bytes.

It runs in a thread of its own, but only while the world waits for it, and until it talks to its workers: then the world
decides which message arrives next, and what becomes of it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from protocol_worker import Content, Parcel, Violation, Worker, must

from transfer.agreement import wire
from transfer.agreement.journal import Journal
from transfer.agreement.protocol import Abort, Finish, Init, Message, Start, State, Update, Withdraw
from transfer.backends import arena
from transfer.config import InFlight, IpcConfig, SenderConfig
from transfer.trainer import session, worker_recovery
from transfer.trainer.fleet import Failures, Fleet, Member

if TYPE_CHECKING:
    from protocol_world import World

UNFINISHED = -1  # what a gradient step leaves until the next version is published
DEADLINE_S = 60.0  # for one thread to wait for the other; each has less than a millisecond to do

Said = tuple[str, Mapping[str, Any]]  # a verb and its body
Answer = dict[str, Any]


class Trainer:
    """Opens, pushes and recovers, again and again, whatever fails; the world's coins decide which."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.rounds = 0
        self.works = False  # the last round
        self.replaced = False  # a worker has refused it as another's, and this one has not opened again
        self.told = False  # the same, or a worker's status has said so
        self.says_it_at_once = world.says_it_at_once
        self._world = world
        self._publisher = Publisher(world, name)
        config = IpcConfig(sender=SenderConfig(), verify=world.verify)
        self._session = session.Session(self._publisher, config, InFlight.wait, Notes(world.tally))
        self._left: dict[Member, list[Said]] = {}  # what is still to be said
        self._heard: dict[Member, list[Answer]] = {}
        self._failures: Failures = {}
        self._last: dict[Worker, Message] = {}  # that each was sent; no finish whose answer was heard
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._dead = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    @property
    def gives_up(self) -> bool:
        """Whether workers obey a later trainer, or one that was faster to take the same epoch, or have told so."""
        ours = self._session.epoch
        must(self.told or not self._session._fence.replaced, "a trainer gives up, and no worker has told it why")
        taken = {(worker.facts.epoch, worker.facts.trainer) for worker in self._world.workers}
        return (
            self.replaced
            or self._session._fence.replaced
            or any(epoch >= ours and who != self._session._fence.trainer for epoch, who in taken)
        )

    def speak(self, which: int, fate: int, fault: int) -> None:
        """Say the next thing to one of the workers that it is talking to."""
        member = list(self._left)[which % len(self._left)]
        verb, body = self._left[member].pop(0)
        answer = self._say(member.sender.worker, verb, body, fate, fault)
        if isinstance(answer, int):
            self._failures[member] = wire.RemoteError(member.sender.name, verb, answer, "")
        else:
            self._heard[member].append(answer)
        if isinstance(answer, int) or not self._left[member]:
            del self._left[member]
        if not self._left:
            self._go.release()
            self._wait()

    def die(self) -> None:
        """Say nothing more."""
        self._dead = True
        self._go.release()
        self._thread.join(DEADLINE_S)

    def learn(self, worker: Worker, message: Message | None, answer: Answer) -> None:
        """Hold what the session takes for finished against what is live; `message` None: it asked for the status."""
        last = self._last.get(worker)
        if not isinstance(last, Finish):
            return
        unheard = message is None and (answer["epoch"], answer["version"]) == (last.epoch, last.version)
        if unheard or message is last:
            published = self._publisher.contents[last.version]
            must(worker.facts.live == published, "what was said to be finished is not live")
        self._world.tally["finished unheard"] += unheard

    def _say(self, worker: Worker, verb: str, body: Mapping[str, Any], fate: int, fault: int) -> Answer | int:
        if verb == "status":
            answer = self._world.ask(self, worker, fate)
            self.told |= not isinstance(answer, int) and self._session._fence.is_anothers(answer)
            return answer
        if verb == "start_weight_update" and "where" in body:
            return self._say_at_once(worker, body, fate, fault)
        message = message_of(verb, body)
        place = self._publisher.place(**body["update_info"]["where"]) if isinstance(message, Update) else None
        self._last[worker] = message
        answer = self._world.send(self, Parcel(self.name, worker, worker.facts, message, place), fate, fault)
        if isinstance(message, Finish) and not isinstance(answer, int):
            del self._last[worker]
        if isinstance(message, Init) and answer == 409:
            must(worker.facts.trainer != self._session._fence.trainer, "a trainer was refused by its own worker")
            self.replaced = self.told = True
        return answer

    def _say_at_once(self, worker: Worker, body: Mapping[str, Any], fate: int, fault: int) -> Answer | int:
        """A start that is an update, and perhaps a finish, too: parts that nothing can come between."""
        named = {"epoch": body["epoch"], "version": body["version"]}
        parts: list[tuple[str, dict[str, Any]]] = [
            ("start_weight_update", {key: body[key] for key in ("epoch", "version", "digest") if key in body}),
            ("update_weights", {"update_info": {**named, "where": body["where"]}}),
        ]
        if body["finish"]:
            parts.append(("finish_weight_update", {"epoch": body["epoch"], "weight_version": str(body["version"])}))
        if self._world.loses(fate):
            return self._say(worker, *parts[0], fate, fault)
        for verb, part in parts[:-1]:
            answer = self._say(worker, verb, part, 0, 0)  # whatever happens does at the last part
            if isinstance(answer, int):
                return answer
        return self._say(worker, *parts[-1], fate, fault)

    def _wait(self) -> None:
        assert self._back.acquire(timeout=DEADLINE_S)
        if self._error is not None:
            raise Violation(f"{self.name}: {self._error!r}") from self._error

    # --- in the session's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._live()
        except Gone:
            pass
        except BaseException as error:
            self._error = error
        self._back.release()

    def _live(self) -> None:
        lines = [Line(self, worker) for worker in self._world.workers]
        opened = False
        while True:
            coins = self._world.coins
            try:
                if not opened or (coins & 1 and not self.works):
                    self.replaced = self.told = False
                    self._session.open({}, lines)
                    opened = True
                if coins & 2:
                    self._session.recover(lines[coins % len(lines)])
                self._session.withdraw()
                self._publisher.train()
                self._session.push({})
                self.works = True
            except wire.TransferError:
                self.works = False
                self._world.tally["failed"] += 1
            self.rounds += 1

    def converse(
        self, members: Sequence[Member], messages: Sequence[Said]
    ) -> tuple[dict[Member, list[Answer]], Failures]:
        """Say these messages, one after the other, to each of the members."""
        self._left = {member: list(messages) for member in members}
        self._heard, self._failures = {member: [] for member in members}, {}
        self._back.release()
        assert self._go.acquire(timeout=DEADLINE_S)
        if self._dead:
            raise Gone
        return {member: heard for member, heard in self._heard.items() if member not in self._failures}, self._failures


def message_of(verb: str, body: Mapping[str, Any]) -> Message:
    """What protocol.py is told."""
    match verb:
        case "init_weight_transfer_engine":
            return Init(body["init_info"]["epoch"], body["init_info"]["trainer"])
        case "update_weights":
            return Update(body["update_info"]["epoch"], body["update_info"]["version"])
        case "finish_weight_update":
            return Finish(body["epoch"], int(body["weight_version"]))
    kinds: dict[str, type[Start | Abort | Withdraw]] = {
        "start_weight_update": Start,
        "abort_weight_update": Abort,
        "withdraw_weights": Withdraw,
    }
    return kinds[verb](**body)


class Gone(BaseException):
    """Ends the thread of a trainer that died."""


class Publisher:
    """Where a trainer writes: slots that arena.py chooses, or a single one: its own memory, or one that is not kept."""

    casts = False
    finds_nonfinite = False
    takes_shards = False
    endpoint: Mapping[str, Any] = {}

    def __init__(self, world: World, name: str) -> None:
        self.keeps = world.keeps or world.exposes
        self.exposes = world.exposes
        self.given = ()
        self.contents: dict[int, Content] = {}  # by version, as written last
        self._world = world
        self._name = name
        self._arena = arena.ArenaPublisher(IpcConfig(sender=SenderConfig()))
        self._slots: list[Content | None] = []

    def place(self, slot: int) -> tuple[list[Content | None], int]:
        """Where a worker finds the bytes, whenever it looks."""
        return self._slots, slot

    def prepare(self, manifest: Any, weights: Any) -> dict[str, Any]:
        """Other slots than before."""
        where = self._arena.prepare(manifest, weights)
        self._slots = [None] * where["slots"]
        return where

    def train(self) -> None:
        """A gradient step: where workers look into the trainer's memory, it changes under them."""
        if self.exposes and self._slots[0] is not None:
            self._world.change(self._slots[0])
            self._slots[0] = self._world.publish(self._name, UNFINISHED)

    def write(
        self, version: int, weights: Any, served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]:
        """New weights; none that a worker needs may be lost by it."""
        where = {"slot": 0}
        if self.keeps and not self.exposes:
            where, _ = self._arena.write(version, weights, served, False)
            self._world.overwrite(self._slots[where["slot"]])
        content = self._slots[where["slot"]] = self.contents[version] = self._world.publish(self._name, version)
        return where, content.digest if with_digest else None

    def release(self) -> None:
        """What a worker has copied is judged by what it holds."""


# --- what stands in place of the rest ---------------------------------------------------------------------------------


class Line:
    """The Sender to one worker."""

    def __init__(self, trainer: Trainer, worker: Worker) -> None:
        self.trainer = trainer
        self.worker = worker
        self.name = f"worker {worker.number}"
        self.remote = trainer.says_it_at_once

    def restart(self) -> bool:
        """A worker that has died is back at once, and everybody may think that it was his doing."""
        return self.worker.state == State()


class Network(Fleet):
    """A Fleet whose messages the world carries."""

    def converse(
        self, members: Sequence[Member], messages: Sequence[Said], timeout_s: float | None = None, **told: Any
    ) -> tuple[dict[Member, list[Answer]], Failures]:
        """Through the world."""
        return members[0].sender.trainer.converse(members, messages) if members else ({}, {})


class NoMemory:
    """An arena's Slots, without any."""

    socket = ""
    device = torch.device("cpu")

    def allocate(self, manifest: Any, weights: Any, count: int) -> dict[str, Any]:
        """So many."""
        self.views = [{}] * count
        return {"slots": count}


class Notes(Journal):
    """A journal that only counts."""

    def __init__(self, tally: Counter[Any]) -> None:
        super().__init__()
        self._tally = tally

    def write(self, op: str, **fields: Any) -> None:
        """One more."""
        self._tally[op] += 1


@contextlib.contextmanager
def replaced_parts() -> Iterator[None]:
    """Within this, sessions are made of them, and do not log the deaths of workers."""
    with (
        mock.patch.object(session, "Fleet", Network),
        mock.patch.object(arena, "Slots", NoMemory),
        mock.patch.object(worker_recovery.LOG, "disabled", True),
    ):
        yield
