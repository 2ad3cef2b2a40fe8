"""Which rank of a trainer a process is: what whoever started it has said, or torchrun in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlhf.config.model import AUTO, Device, ModelConfig
from rlhf.config.trainer import OneConfig, TrainerConfig

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Invitation:
    """Where the first rank waits for the others, and the key that lets them in."""

    host: str
    port: int
    key: str


@dataclass(frozen=True, slots=True)
class Place:
    """A process among the ranks of a trainer; `invitation`, which all but the first have, says where they meet."""

    number: int = 0
    count: int = 1
    local: int = 0  # number among the ranks of this host: of its GPU
    invitation: Invitation | None = None
    torchrun: bool = False  # which has started all ranks
    hosts: int = 1  # on which the ranks are, equally many on each, one host's behind the other's

    @property
    def holders(self) -> int:
        """How many ranks a host has."""
        return self.count // self.hosts

    @property
    def first(self) -> bool:
        """Whether this rank speaks with the outside."""
        return self.number == 0


def place_of(config: TrainerConfig, model: ModelConfig, environment: Mapping[str, str] = os.environ) -> Place:
    """The first rank's place, with how many there are; ValueError where that is not what torchrun has started."""
    started = by_torchrun(environment)
    if isinstance(config, OneConfig):
        if started is not None and started.count > 1:
            raise ValueError(
                f"torchrun has started {started.count} processes, and trainer=one is one: set trainer=replicas, or "
                "start python -m rlhf.train without torchrun"
            )
        return Place()
    if started is None:
        if config.hosts > 1 and config.address is None:
            raise ValueError(
                f"the ranks of {config.hosts} hosts (trainer.hosts) are started by a Ray, which trainer.address names, "
                "or by torchrun on each host"
            )
        return Place(count=_gpus(config, model) if config.ranks == AUTO else config.ranks, hosts=config.hosts)
    if config.address is not None:
        raise ValueError("torchrun has started all ranks: leave out trainer.address")
    if config.ranks not in (AUTO, started.count):
        raise ValueError(
            f"torchrun has started {started.count} processes: trainer.ranks must be as many, or auto "
            f"(got {config.ranks})"
        )
    if started.count % config.hosts:
        raise ValueError(
            f"torchrun has started {started.count} processes: trainer.hosts must divide that (got {config.hosts})"
        )
    place = replace(started, hosts=config.hosts)
    if config.gpus is not None and len(config.gpus) != place.holders:
        raise ValueError(
            f"torchrun has started {place.holders} processes on each host (trainer.hosts={config.hosts}): trainer.gpus "
            f"must name as many (got {config.gpus})"
        )
    return place


def by_torchrun(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place of a process that torchrun has started; None of any other."""
    if not all(name in environment for name in TORCHRUN):
        return None
    number, count, local = (int(environment[name]) for name in TORCHRUN[:3])
    return Place(number, count, local, torchrun=True)


def _gpus(config: TrainerConfig, model: ModelConfig) -> int:
    if config.gpus is not None:
        return len(config.gpus)
    import torch

    count = 0 if model.device is Device.cpu else torch.cuda.device_count()
    if not count:
        raise ValueError("trainer.ranks=auto takes the GPUs that are there, and there is none: say how many processes")
    return count
