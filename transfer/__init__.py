"""Moves the weights of a policy from its trainer to its samplers, between gradient steps.

Two planes: a *backend* moves bytes (`ipc`, `gloo`, `nccl`, `disk`, `handles`,
`local`), a *sender* tells a worker what to do
(`http`, `ray`).

    with make_transfer(config, folder) as transfer:      # the backend's sending half, before any worker exists
        senders = ...                                    # start workers; each gets `transfer.endpoint` privately
        transfer.open(module.state_dict(), senders)      # agree once on names, dtypes and shapes
        version = transfer.push(module.state_dict())     # between gradient steps: version 0, 1, 2, ...
        transfer.withdraw()                              # before the next step changes them

In the worker, `make_receiver(endpoint, module)` is the other half (worker/receiver.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfer.agreement.journal import Journal
from transfer.config import InFlight
from transfer.trainer.interfaces import Ranks as Ranks
from transfer.trainer.interfaces import Sender as Sender
from transfer.trainer.interfaces import Transfer as Transfer

if TYPE_CHECKING:
    import torch

    from transfer.config import TransferConfig
    from transfer.engine.base import WeightTransferEngine as WeightTransferEngine
    from transfer.engine.base import WeightTransferInitInfo as WeightTransferInitInfo
    from transfer.engine.base import WeightTransferUpdateInfo as WeightTransferUpdateInfo
    from transfer.engine.ipc import IPCTrainerSendWeightsArgs as IPCTrainerSendWeightsArgs
    from transfer.engine.ipc import IPCWeightTransferEngine as IPCWeightTransferEngine
    from transfer.engine.ipc import IPCWeightTransferInitInfo as IPCWeightTransferInitInfo
    from transfer.engine.ipc import IPCWeightTransferUpdateInfo as IPCWeightTransferUpdateInfo
    from transfer.trainer.senders.direct import DirectSender as DirectSender
    from transfer.trainer.senders.http import HttpSender as HttpSender
    from transfer.trainer.senders.ray import RaySender as RaySender
    from transfer.trainer.sources import full_weights as full_weights
    from transfer.worker.receiver import Receiver


def make_transfer(
    config: TransferConfig,
    folder: Path,
    in_flight: InFlight = InFlight.wait,
    journal: Journal | None = None,
    ranks: Ranks | None = None,
) -> Transfer:
    """The session for a configuration.

    `folder` is where the backend may write (disk); `in_flight` says what becomes of completions that are being sampled
    when an update is finished; `journal` notes what is done. `ranks` are those of a trainer of several, each of which
    makes one: their weights may be DTensors, sharded on dim 0.
    """
    if ranks is not None and ranks.count > 1:
        from transfer.trainer.ranks import make_of_ranks

        return make_of_ranks(config, folder, in_flight, journal or Journal(), ranks)
    from transfer.backends.make import make_publisher
    from transfer.trainer.session import Session

    return Session(make_publisher(config, folder), config, in_flight, journal or Journal())


def make_receiver(endpoint: Mapping[str, Any], module: torch.nn.Module, journal: Journal | None = None) -> Receiver:
    """The worker's half: takes updates into `module`, by the backend that `endpoint` names; `journal` notes them."""
    from transfer.backends.make import make_intake
    from transfer.worker.landing import Landing
    from transfer.worker.receiver import Receiver

    return Receiver(make_intake(endpoint), Landing.of(module), journal or Journal())


ELSEWHERE = {  # imported at the first use, which `--help` never makes
    "DirectSender": "transfer.trainer.senders.direct",
    "HttpSender": "transfer.trainer.senders.http",
    "RaySender": "transfer.trainer.senders.ray",
    "full_weights": "transfer.trainer.sources",
    "WeightTransferEngine": "transfer.engine.base",  # the one-call API, vLLM's names
    "WeightTransferInitInfo": "transfer.engine.base",
    "WeightTransferUpdateInfo": "transfer.engine.base",
    "IPCTrainerSendWeightsArgs": "transfer.engine.ipc",
    "IPCWeightTransferEngine": "transfer.engine.ipc",
    "IPCWeightTransferInitInfo": "transfer.engine.ipc",
    "IPCWeightTransferUpdateInfo": "transfer.engine.ipc",
}


def __getattr__(name: str) -> Any:
    if name not in ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(ELSEWHERE[name]), name)
