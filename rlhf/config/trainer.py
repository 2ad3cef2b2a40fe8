"""On how many processes the trainer runs, and what each of them holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rlhf.config.model import AUTO
from rlhf.config.rules import at_least, one_of
from transfer.agreement.shown import shown
from transfer.config import positive

STEP, LAYER = "step", "layer"  # what is gathered at once: all weights of an update, or a decoder layer's of a pass
HOST_AND_PORT = re.compile(r"[\w.-]+:\d{1,5}")


@dataclass(slots=True, kw_only=True)
class TrainerConfig:
    """Ranks of the trainer, each with its share of a step's micro-batches; gradients are summed once an update."""

    ranks: Any = AUTO  # processes; auto: as many as torchrun has started, else one a GPU that is there
    hosts: int = 1  # on how many they are, equally many on each
    address: str | None = None  # of the Ray that starts them, and workers, on these hosts; null: this host, or torchrun
    gpus: list[int] | None = None  # of each host, one a rank; null: the first ones
    timeout_s: float = 600.0  # for another rank to come to where this one is

    def __post_init__(self) -> None:
        if self.ranks != AUTO:
            if not isinstance(self.ranks, int) or isinstance(self.ranks, bool):
                raise ValueError(f"trainer.ranks must be auto or a whole number (got {shown(self.ranks)})")
            at_least("trainer.ranks", self.ranks, 1)
        at_least("trainer.hosts", self.hosts, 1)
        if self.ranks != AUTO and self.ranks % self.hosts:
            raise ValueError(
                f"trainer.ranks must be a multiple of trainer.hosts, which have equally many each (got {self.ranks} "
                f"and {self.hosts})"
            )
        self._check_gpus()
        if self.address is not None:
            self._check_address()
        positive("trainer.timeout_s", self.timeout_s)

    def _check_address(self) -> None:
        _, _, port = str(self.address).rpartition(":")
        if self.address != "auto" and not (HOST_AND_PORT.fullmatch(str(self.address)) and int(port) < 2**16):
            raise ValueError(
                "trainer.address must be auto or like 127.0.0.1:6379, a Ray that this host is a node of (got "
                f"{shown(self.address)})"
            )
        if self.ranks == AUTO:
            raise ValueError("trainer.ranks must be a number where a Ray starts them (trainer.address)")

    def _check_gpus(self) -> None:
        gpus = self.gpus
        if gpus is None:
            return
        if len(set(gpus)) < len(gpus) or any(index < 0 for index in gpus):
            raise ValueError(f"trainer.gpus must name different GPUs, from 0 (got {gpus})")
        if self.ranks != AUTO and len(gpus) * self.hosts != self.ranks:
            raise ValueError(
                f"trainer.gpus must name {self.ranks // self.hosts}, one for each rank of a host (got {gpus})"
            )


@dataclass(slots=True, kw_only=True)
class OneConfig(TrainerConfig):
    """One process: on one GPU, or on the CPU."""

    ranks: Any = 1

    def __post_init__(self) -> None:
        TrainerConfig.__post_init__(self)
        if self.hosts != 1 or self.address is not None:
            raise ValueError("trainer=one is one process of this host: leave out trainer.hosts and trainer.address")
        if self.ranks != 1:
            raise ValueError(
                f"trainer=one is one process: set trainer.ranks=1, or trainer=replicas or sharded (got {self.ranks})"
            )


@dataclass(slots=True, kw_only=True)
class ReplicasConfig(TrainerConfig):
    """Every rank has whole models, moments of the optimiser included."""


@dataclass(slots=True, kw_only=True)
class ShardedConfig(TrainerConfig):
    """Every rank has its rows of every weight, gradient and moment (FSDP2), and gathers weights to compute."""

    gather: str = AUTO  # step: all weights once an update; layer: each decoder layer when a pass comes to it;
    # auto: step where a GPU has the memory, and on a CPU
    reshard: bool | None = None  # gather=layer: drop a layer between its forward and its backward pass; null: true
    offload: bool = False  # shards, their gradients and moments in the host's memory, not the GPU's

    def __post_init__(self) -> None:
        TrainerConfig.__post_init__(self)
        one_of("trainer.gather", self.gather, (AUTO, STEP, LAYER))
        if self.gather == STEP and self.reshard:
            raise ValueError(
                "trainer.gather=step keeps all weights until an update's last backward pass, so that none is dropped "
                "before: leave out trainer.reshard=true, or set trainer.gather=layer"
            )

    @property
    def by_layer(self) -> bool:
        """Whether a layer is gathered for each pass; asked once it is known what `auto` is."""
        return self.gather == LAYER
