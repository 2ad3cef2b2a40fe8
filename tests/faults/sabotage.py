"""Faults that are planted on purpose, to prove that the harness sees what it is there to see."""

from __future__ import annotations

import dataclasses
import itertools
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from transfer.agreement import protocol
from transfer.agreement.wire import TransferError
from transfer.backends import arena
from transfer.backends.collective_rows import CollectiveShards
from transfer.backends.shards import Shards
from transfer.memory.rows import whole_of
from transfer.trainer import session
from transfer.trainer.ranks import Line
from transfer.worker.gate import Gate
from transfer.worker.standing import Standing
from transfer.worker.update import Updates
from transfer.worker.verification import Verification


def plant(name: str) -> None:
    """Make this process, trainer or worker, faulty; "" leaves it as it is."""
    if name:
        PLANTED[name]()


def label_before_flip() -> None:
    """The worker goes by the new version first, then replaces one tensor after the other while it serves."""

    @contextmanager
    def nobody_waits(self: Gate, timeout_s: float) -> Iterator[None]:
        yield

    def replace_weights(self: Updates) -> None:
        torn = protocol.reported(self._standing.state, protocol.Event.WRITING)
        self._standing.state = protocol.reported(torn, protocol.Event.FLIPPED)
        for name, staged in self._staged.items():
            for tensor in self._place._tensors[name]:
                tensor.data = whole_of(staged, tensor.shape, tensor.dtype, tensor.device)
                time.sleep(0.0005)

    Gate.exclusive = nobody_waits
    Updates._replace_weights = replace_weights


def serves_when_empty() -> None:
    """A worker without weights serves what it was built with, as version 0."""
    Standing.serves = lambda self: self.state.version or 0


def writes_what_is_served() -> None:
    """The trainer writes into the first slot whoever serves it."""
    write = arena.ArenaPublisher.write

    def careless(self: Any, version: int, weights: Any, served: Collection[int], with_digest: bool) -> Any:
        return write(self, version, weights, (), with_digest)

    arena.ArenaPublisher.write = careless


def takes_replays() -> None:
    """The worker applies a version, also an older one, as often as it comes."""

    def start(state: protocol.State, message: protocol.Start) -> tuple[protocol.State, protocol.Decision]:
        staging = dataclasses.replace(
            state, target=message.version, target_digest=message.digest, staged=state.target == message.version
        )
        return staging, protocol.Do()

    protocol._start = start


def obeys_anybody() -> None:
    """The worker does what the messages of any trainer say."""
    step = protocol.step

    def unfenced(state: protocol.State, message: protocol.Message, now: float, lease_s: float) -> Any:
        if not isinstance(message, protocol.Init):
            message = dataclasses.replace(message, epoch=state.epoch)
        return step(state, message, now, lease_s)

    protocol.step = unfenced


def remembers() -> None:
    """A worker that is started again serves the weights that it had before its end."""
    made, replace_weights = Updates.__init__, Updates._replace_weights

    def place(self: Updates) -> Path:
        return Path(self._standing.journal._file.name).with_suffix(".remembered")

    def replaced(self: Updates) -> None:
        replace_weights(self)
        tensors = {name: tensors[0].clone() for name, tensors in self._place._tensors.items()}
        new = place(self).with_suffix(".new")
        torch.save((self._standing.state.version, self._standing.state.digest, tensors), new)
        new.replace(place(self))

    def remembering(self: Updates, *arguments: Any) -> None:
        made(self, *arguments)
        if place(self).exists():
            version, digest, tensors = torch.load(place(self))
            self._standing.state = protocol.State(version=version, digest=digest)
            for name, tensor in tensors.items():
                self._place._tensors[name][0].data = tensor

    Updates.__init__ = remembering
    Updates._replace_weights = replaced


def leaks_descriptors() -> None:
    """The worker forgets to close a file whenever a trainer comes."""
    agree = Updates._agree

    def leaking(self: Updates, info: Any) -> None:
        os.open("/dev/null", os.O_RDONLY)
        agree(self, info)

    Updates._agree = leaking


def leaks_shared_memory() -> None:
    """The trainer has a name in /dev/shm, which a kill leaves there."""
    opened = session.Session.open

    def leaking(self: Any, *arguments: Any) -> None:
        Path(f"/dev/shm/{LEAKED}{secrets.token_hex(4)}").write_bytes(b"weights")
        opened(self, *arguments)

    session.Session.open = leaking


def forgets_to_withdraw() -> None:
    """The trainer changes its weights while workers serve them where they lie."""
    session.Session.withdraw = lambda self: self._withdrawal.viewers.clear()


def trusts_the_trainer() -> None:
    """The worker serves what it has copied, however long that took."""
    Verification._check_still = lambda self: None


def leaves_rows_out() -> None:
    """A rank beside the first leaves its rows now and then as they are in the slot."""
    write, turns = Shards._write, itertools.count()

    def careless(self: Shards, *arguments: Any) -> dict[str, Any]:
        if self._rows.number and next(turns) % 3 == 2:
            return {"bad": None, "sums": None}
        return write(self, *arguments)

    Shards._write = careless


def leaves_shares_out() -> None:
    """A rank beside the first sends now and then what is left in its buffers."""
    packer, turns = CollectiveShards.packer, itertools.count()

    def careless(self: CollectiveShards, *arguments: Any) -> Any:
        made = packer(self, *arguments)
        if self._rows.number and next(turns) % 3 == 2:
            made.pack = lambda pieces, packed: None
        return made

    CollectiveShards.packer = careless


def outlives_the_others() -> None:
    """A rank waits for one that is gone."""
    from rlhf.ranks.watch import Watch

    said = Line._said

    def patient(self: Line, *arguments: Any) -> Any:
        try:
            return said(self, *arguments)
        except TransferError:
            time.sleep(PATIENCE_S)
            raise

    Line._said = patient
    Watch._lost = lambda self, connection: time.sleep(PATIENCE_S)


PATIENCE_S = 60.0
LEAKED = "planted-by-tests-faults-"
PLANTED: dict[str, Callable[[], None]] = {
    "label-before-flip": label_before_flip,
    "serves-when-empty": serves_when_empty,
    "writes-what-is-served": writes_what_is_served,
    "takes-replays": takes_replays,
    "obeys-anybody": obeys_anybody,
    "remembers": remembers,
    "leaks-descriptors": leaks_descriptors,
    "leaks-shared-memory": leaks_shared_memory,
    "forgets-to-withdraw": forgets_to_withdraw,
    "trusts-the-trainer": trusts_the_trainer,
    "leaves-rows-out": leaves_rows_out,
    "leaves-shares-out": leaves_shares_out,
    "outlives-the-others": outlives_the_others,
}
