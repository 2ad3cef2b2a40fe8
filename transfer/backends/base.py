"""What a backend is: a sending half, `Publisher`, in the trainer, and a receiving half, `Intake`, in each worker."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from transfer.agreement.manifest import Manifest

Weights = Mapping[str, torch.Tensor]
Staged = Mapping[str, torch.Tensor]  # by entry name


class Publisher(Protocol):
    """The sending half of a backend."""

    endpoint: dict[str, Any]  # what its receiving half is made from; JSON
    casts: bool  # whether it writes the workers' dtype, whatever the trainer's
    keeps: bool  # whether the bytes of a version stay until the next is written
    finds_nonfinite: bool  # whether values that are not finite are found, as NotFinite or by workers, with no search
    exposes: bool  # whether workers serve the trainer's own memory: to be withdrawn before it changes
    given: tuple[torch.Tensor, ...]  # the tensors of `prepare`, if they are themselves what workers read

    def prepare(self, manifest: Manifest, weights: Weights) -> dict[str, Any]: ...
    def write(
        self, version: int, weights: Weights, served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]: ...
    def release(self) -> None: ...  # the trainer goes on: nothing may be read of its own memory any more
    def close(self) -> None: ...


class Alongside(Protocol):
    """What the trainer has to do itself while workers carry out its messages."""

    def run(self, timeout_s: float) -> None: ...
    def give_up(self) -> None: ...


class Part(Alongside, Protocol):
    """What a broadcasting trainer does during one update, and what its workers must be told to meet it."""

    where: dict[str, Any]


@runtime_checkable
class BroadcastPublisher(Publisher, Protocol):
    """The sending half of a backend in which the trainer sends while all workers of an update receive."""

    def holds(self, version: int) -> bool: ...
    def alongside(self, version: int, takers: Sequence[Hashable]) -> Part: ...


@runtime_checkable
class FencedPublisher(Publisher, Protocol):
    """The sending half of a backend in which two trainers could write to the same place: it is told its epoch."""

    def fence(self, epoch: int) -> None: ...


class Intake(Protocol):
    """The receiving half of a backend."""

    in_place: bool  # copy staged tensors into the module's own memory, rather than put them in its place
    settled: bool  # staged bytes stay as they are until `finish`; else only what was copied can be verified
    unchecked: bool  # nobody has looked yet for values that are not finite
    owner: torch.device  # whose memory `slots` are

    @property
    def slots(self) -> Sequence[Staged]:
        """Memory from which updates come again and again, as `stage` returns it."""

    def prepare(self, manifest: Manifest, where: Mapping[str, Any], device: torch.device) -> None: ...
    def stage(self, version: int, where: Mapping[str, Any]) -> Staged: ...
    def still(self, version: int) -> bool: ...  # whether what was read of it up to now is whole
    def close(self) -> None: ...
