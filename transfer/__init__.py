"""Moves the weights of a policy from its trainer to its samplers, between gradient steps.

Two planes: a *backend* moves bytes (`ipc`, `gloo`, `nccl`, `disk`, `local`), a *sender* tells a worker what to do
(`http`, `ray`).

    with make_transfer(config, folder) as transfer:      # the backend's sending half, before any worker exists
        senders = ...                                    # start workers; each gets `transfer.endpoint` privately
        transfer.open(module.state_dict(), senders)      # agree once on names, dtypes and shapes
        version = transfer.push(module.state_dict())     # between gradient steps: version 0, 1, 2, ...
        transfer.withdraw()                              # before the next step changes them

In the worker, `make_receiver(endpoint, module)` is the other half (receiver.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transfer.config import InFlight
from transfer.journal import Journal

if TYPE_CHECKING:
    import torch

    from transfer.config import TransferConfig
    from transfer.engine import WeightTransferEngine as WeightTransferEngine
    from transfer.engine import WeightTransferInitInfo as WeightTransferInitInfo
    from transfer.engine import WeightTransferUpdateInfo as WeightTransferUpdateInfo
    from transfer.ipc import IPCTrainerSendWeightsArgs as IPCTrainerSendWeightsArgs
    from transfer.ipc import IPCWeightTransferEngine as IPCWeightTransferEngine
    from transfer.ipc import IPCWeightTransferInitInfo as IPCWeightTransferInitInfo
    from transfer.ipc import IPCWeightTransferUpdateInfo as IPCWeightTransferUpdateInfo
    from transfer.receiver import Receiver
    from transfer.session import PushStats

    Weights = Mapping[str, torch.Tensor]  # as Module.state_dict() gives them; tied weights under each of their names


class Sender(Protocol):
    """The control plane to one worker."""

    name: str  # as errors and logs call the worker: "worker 0 (http://127.0.0.1:40123)"

    def call(self, verb: str, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """Call one of the worker's verbs (wire.ROUTES) and return its answer; RemoteError if it refuses or is gone."""

    def restart(self) -> bool:
        """If the worker has died, start it anew and wait until it answers; False if it lives, or nobody here can.

        To be called in the thread that started it.
        """

    def close(self) -> None: ...


class Transfer(AbstractContextManager["Transfer"], Protocol):
    """A session that carries versions of one policy to a fixed set of workers."""

    @property
    def endpoint(self) -> Mapping[str, Any]:
        """What a worker must be told, privately, when it is launched; JSON."""

    @property
    def last(self) -> PushStats:
        """What the last push took."""

    @property
    def epoch(self) -> int:
        """The highest that this session has taken."""

    def open(self, weights: Weights, senders: Sequence[Sender], version: int = 0, epoch: int = 0) -> None:
        """Agree with every worker on the manifest; ValueError with the first differences, before any byte moves.

        For a trainer that goes on: the version of its first push, if no worker has a higher one, and the epoch it had.
        """

    def push(self, weights: Weights) -> int:
        """Make `weights` the live ones in every worker, or in none; the new version. TransferError says who failed."""

    def withdraw(self) -> None:
        """Call before the weights change: workers that serve the trainer's own memory stop; for others, nothing."""

    def recover(self, sender: Sender) -> bool:
        """Bring a worker that was started again to the newest version; False if that is not what it lacks."""

    def close(self) -> None: ...


def make_transfer(
    config: TransferConfig, folder: Path, in_flight: InFlight = InFlight.wait, journal: Journal | None = None
) -> Transfer:
    """The session for a configuration.

    `folder` is where the backend may write (disk); `in_flight` says what becomes of completions that are being sampled
    when an update is finished; `journal` notes what is done.
    """
    from transfer.session import Session, make_publisher

    return Session(make_publisher(config, folder), config, in_flight, journal or Journal())


def make_receiver(endpoint: Mapping[str, Any], module: torch.nn.Module, journal: Journal | None = None) -> Receiver:
    """The worker's half: takes updates into `module`, by the backend that `endpoint` names; `journal` notes them."""
    from transfer.landing import Landing
    from transfer.receiver import Receiver, make_intake

    return Receiver(make_intake(endpoint), Landing.of(module), journal or Journal())


ONE_SHOT = {  # the one-shot API, vLLM's names; imported at the first use, which `--help` never makes
    "WeightTransferEngine": "transfer.engine",
    "WeightTransferInitInfo": "transfer.engine",
    "WeightTransferUpdateInfo": "transfer.engine",
    "IPCTrainerSendWeightsArgs": "transfer.ipc",
    "IPCWeightTransferEngine": "transfer.ipc",
    "IPCWeightTransferInitInfo": "transfer.ipc",
    "IPCWeightTransferUpdateInfo": "transfer.ipc",
}


def __getattr__(name: str) -> Any:
    if name not in ONE_SHOT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(ONE_SHOT[name]), name)
