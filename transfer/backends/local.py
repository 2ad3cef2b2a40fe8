"""Backend `local`: the sampler's module is the learner's own, so there is nothing to move; only the version changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from transfer.agreement import wire
from transfer.agreement.manifest import Manifest
from transfer.backends.hold import Holds


class LocalPublisher:
    """The sending half, which writes nothing."""

    casts = True
    keeps = False
    finds_nonfinite = False
    takes_shards = False
    exposes = False
    given: tuple[torch.Tensor, ...] = ()

    def __init__(self) -> None:
        self.endpoint: dict[str, Any] = {"backend": "local"}

    def prepare(self, manifest: Manifest, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Nothing to prepare."""
        return {}

    def write(
        self, version: int, weights: Mapping[str, torch.Tensor], served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]:
        """Nothing to write."""
        return {}, None

    def release(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing to close."""


class HandlesPublisher(LocalPublisher):
    """Of weights that a thread of this process sends to a server by handles: a push waits until it has done so."""

    def __init__(self) -> None:
        self._holds = Holds()
        self.endpoint = {"backend": "local", "hold": self._holds.name}

    def write(
        self, version: int, weights: Mapping[str, torch.Tensor], served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]:
        """Nothing to write; the weights hold still."""
        self._holds.renew()
        return {}, None

    def release(self) -> None:
        """Wait for an update that is being sent, and let no later one read the weights."""
        self._holds.newest.end()


class LocalIntake:
    """The receiving half, which stages nothing."""

    in_place = False
    settled = True
    unchecked = False
    slots: Sequence[dict[str, torch.Tensor]] = ()
    owner = torch.device("cpu")

    def prepare(self, manifest: Manifest, where: Mapping[str, Any], device: torch.device) -> None:
        """Nothing to prepare."""
        wire.only(dict(where), {}, "where")

    def stage(self, version: int, where: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """No tensors: the module has the new weights already."""
        wire.only(dict(where), {}, "where")
        return {}

    def still(self, version: int) -> bool:
        """Always: the sampler has nothing but the trainer's module."""
        return True

    def close(self) -> None:
        """Nothing to close."""
