"""What a backend is: a sending half, `Publisher`, in the trainer, and a receiving half, `Intake`, in each worker."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from transfer.agreement.manifest import Manifest
from transfer.memory.rows import Placed

Weights = Mapping[str, torch.Tensor]
Staged = Mapping[str, Placed]  # by entry name


class Publisher(Protocol):
    """The sending half of a backend.

    A session calls `prepare` when it opens; then for each version `write`, always with weights of that manifest, and
    `release` when the update is over, whatever came of it, or, where it `exposes`, before the trainer's memory changes.
    """

    endpoint: dict[str, Any]  # what its receiving half is made from; JSON
    casts: bool  # whether it writes the workers' dtype, whatever the trainer's
    keeps: bool  # whether the bytes of a version stay until the next is written
    finds_nonfinite: bool  # whether values that are not finite are found, as NotFinite or by workers, with no search
    takes_shards: bool  # whether weights may be DTensors, of which each rank of the trainer holds a part
    exposes: bool  # whether workers serve the trainer's own memory: to be withdrawn before it changes
    given: tuple[torch.Tensor, ...]  # the tensors of `prepare`, if they are themselves what workers read

    def prepare(self, manifest: Manifest, weights: Weights) -> dict[str, Any]:
        """Make ready for such weights; what a worker must know to take any version of them; JSON."""

    def write(
        self, version: int, weights: Weights, served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]:
        """Write a version, over none that is in `served`: where it is, as JSON, and its digest, if there is one.

        {} for where: no byte had to move. OSError or RuntimeError if it cannot be written; NotFinite.
        """

    def release(self) -> None:
        """The trainer goes on: nothing may be read of its own memory any more."""

    def close(self) -> None:
        """Give up what is held; workers keep what they have."""


class Alongside(Protocol):
    """What the trainer has to do itself while workers carry out its messages."""

    def run(self, timeout_s: float) -> None:
        """Do it, in a thread of its own; any error: it has failed for all workers."""

    def give_up(self) -> None:
        """Let `run` end soon, by ConnectionAbortedError, as some worker has failed; from any thread."""


class Part(Alongside, Protocol):
    """What a broadcasting trainer does during one update, and what its workers must be told to meet it."""

    where: dict[str, Any]


@runtime_checkable
class BroadcastPublisher(Publisher, Protocol):
    """The sending half of a backend in which the trainer sends while all workers of an update receive."""

    def holds(self, version: int) -> bool:
        """Whether what a broadcast would send is still this version, as far as can be told."""

    def alongside(self, version: int, takers: Sequence[Hashable]) -> Part:
        """The trainer's part in sending it to these workers; OSError, RuntimeError or ValueError if it cannot be."""


@runtime_checkable
class FencedPublisher(Publisher, Protocol):
    """The sending half of a backend in which two trainers could write to the same place: it is told its epoch."""

    def fence(self, epoch: int) -> None:
        """Write under names of this epoch from now on, so that no other trainer's are replaced."""


class Intake(Protocol):
    """The receiving half of a backend."""

    in_place: bool  # copy staged tensors into the module's own memory, rather than put them in its place
    settled: bool  # staged bytes stay as they are until `finish`; else only what was copied can be verified
    unchecked: bool  # nobody has looked yet for values that are not finite
    owner: torch.device  # whose memory `slots` are

    @property
    def slots(self) -> Sequence[Staged]:
        """Memory from which updates come again and again, as `stage` returns it."""

    def prepare(self, manifest: Manifest, where: Mapping[str, Any], device: torch.device) -> None:
        """Make ready to take any version, from what the sending half's `prepare` has said; ValueError, Refused."""

    def stage(self, version: int, where: Mapping[str, Any]) -> Staged:
        """Take or map the bytes of a version, from what its `write` has said; any error: nothing was staged."""

    def still(self, version: int) -> bool:
        """Whether what was read of this version up to now is whole."""

    def close(self) -> None:
        """Give up what is held, but for what the module serves."""
