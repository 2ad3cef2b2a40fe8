"""Backends `gloo` and `nccl`: a torch.distributed broadcast from the trainer to the workers of an update.

    CollectivePublisher   here, the sending half; of a trainer with sharded weights: collective_shards.py
    CollectiveIntake      the receiving half: collective_intake.py

The weights travel as bytes, at the offsets of the manifest, in buckets: while one is under way the next is packed. The
process group is formed at an update, of exactly the workers that take part, and kept while they stay the same; after
any failure both sides drop it, and the next update forms another. Who is authenticated there, and who is not:
process_group.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import torch

from transfer.agreement.manifest import ALIGNMENT, Manifest, round_up
from transfer.backends.base import Part
from transfer.backends.buckets import Packer, buckets_of
from transfer.backends.group_ends import TrainerGroup, listener
from transfer.backends.hold import Hold
from transfer.backends.process_group import DEPTH, SHARE
from transfer.config import CollectiveConfig, Library, taken
from transfer.memory import regions
from transfer.memory.digest import Hasher, digest_of


class Broadcast:
    """The trainer's part of one update."""

    def __init__(self, group: TrainerGroup, send: Callable[[float], None]) -> None:
        self._group = group
        self._send = send
        self.where = group.where

    def run(self, timeout_s: float) -> None:
        """Broadcast while the workers receive."""
        self._send(SHARE * timeout_s)

    def give_up(self) -> None:
        """A worker has failed: the others need not wait for it."""
        self._group.give_up()


class CollectivePublisher:
    """The sending half: broadcasts out of the trainer's own tensors, of which it keeps no copy but two buckets.

    It holds those tensors until the next version: a worker that was started again gets them, if they have not changed.
    """

    casts = True
    keeps = True  # as far as `holds` says
    finds_nonfinite = False
    takes_shards = False
    exposes = False
    given: tuple[torch.Tensor, ...] = ()

    def __init__(self, config: CollectiveConfig) -> None:
        if config.library is Library.nccl and not torch.cuda.is_available():
            raise ValueError("transfer=nccl moves weights between GPUs, and torch sees none here: use transfer=gloo")
        self._config = config
        self._size = config.bucket_bytes
        self._manifest = Manifest((), 0)
        self._weights: Mapping[str, torch.Tensor] = {}  # of the version written last
        self._version: int | None = None
        self._digest: str | None = None
        self._device = torch.device("cpu")
        self._memory: list[torch.Tensor] = []
        self._takers: Sequence[Hashable] = ()
        self._group: TrainerGroup | None = None
        self._ranks = 1  # of the trainer, that send
        self._hold = Hold()  # of the broadcast that began last
        self.endpoint = {"backend": config.library.value, "host": config.host, "take": taken(config.take).value}

    def prepare(self, manifest: Manifest, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Allocate the buckets; what a worker must know of the trainer."""
        self._drop_group()
        with listener(self._config.host):
            pass
        self._manifest, self._version = manifest, None
        devices = []
        if self._config.library is Library.nccl:
            self._device = gpu_of(weights)
            devices = [regions.device_uuid(self._device)]
        self._allocate()
        return self._told(devices)

    def _told(self, devices: list[str]) -> dict[str, Any]:
        """To the workers: until when they wait, and the GPUs that are taken, if bytes move between GPUs."""
        where: dict[str, Any] = {"timeout_s": float(self._config.sender.timeout_s)}
        return where if self._config.library is Library.gloo else {**where, "devices": devices}

    def write(
        self, version: int, weights: Mapping[str, torch.Tensor], served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]:
        """Only look: the weights are sent when the workers receive them; the size of a bucket, and the digest."""
        self._weights, self._version = weights, version
        self._digest = self._digest_now() if with_digest else None
        return {"bucket": self._size}, self._digest

    def holds(self, version: int) -> bool:
        """Whether the trainer's tensors are still those of this version, as far as a digest can tell."""
        return version == self._version and self._digest is not None and self._digest_now() == self._digest

    def alongside(self, version: int, takers: Sequence[Hashable]) -> Part:
        """The trainer's part of an update to the version written last; `takers` tells sets of workers apart."""
        assert version == self._version, f"version {version} is not the one written last"
        group = self._group_with(takers)
        self._hold = Hold()
        count, pack = self._packed()
        return Broadcast(group, lambda timeout_s: group.broadcast(timeout_s, count, pack))

    def release(self) -> None:
        """No bucket is packed any more: a broadcast that lags behind its push ends instead of sending later weights."""
        self._hold.end()
        self._synchronize()

    def close(self) -> None:
        """Leave the group; workers keep what they have."""
        self._drop_group()
        self._memory, self._weights = [], {}

    def _group_with(self, takers: Sequence[Hashable]) -> TrainerGroup:
        """The group of these workers and the trainer's ranks: the last one, or a new one."""
        if self._group is not None and not self._group.usable:
            self._allocate()  # a broadcast that was given up may still read the old ones
        if self._group is None or not self._group.usable or self._takers != takers:
            self._drop_group()
            world = self._ranks + len(takers)
            self._group = TrainerGroup(self._config.library, self._device, world, self._config.host)
            self._takers = takers
        return self._group

    def _allocate(self) -> None:
        size = min(self._size, max(ALIGNMENT, round_up(self._manifest.nbytes, ALIGNMENT)))
        self._memory = [torch.zeros(size, dtype=torch.uint8, device=self._device) for _ in range(DEPTH)]

    def _drop_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def _synchronize(self) -> None:
        """What is queued may write the weights, or read them."""
        for device in {tensor.device for tensor in self._weights.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)

    def _packed(self) -> tuple[int, Callable[[int], torch.Tensor]]:
        """How many buckets there are, and what packs one while the weights are held."""
        self._synchronize()
        buckets = buckets_of(self._manifest, self._size)
        packer = Packer(self._weights, self._hold)

        def pack(index: int) -> torch.Tensor:
            bucket, packed = buckets[index], self._memory[index % DEPTH]
            packer.pack(bucket.pieces, packed)
            return packed[: bucket.end - bucket.start]

        return len(buckets), pack

    @torch.no_grad()
    def _digest_now(self) -> str:
        sent = ((entry, self._weights[entry.name].detach()) for entry in self._manifest.entries)
        cast = (tensor.to(entry.torch_dtype) for entry, tensor in sent)
        if any(tensor.is_cuda for tensor in self._weights.values()):
            return digest_of(cast)
        hasher = Hasher()
        for tensor in cast:
            hasher.add(tensor)
        return hasher.digest()


def gpu_of(weights: Mapping[str, torch.Tensor]) -> torch.device:
    """The GPU of a trainer's weights; ValueError if they are on none."""
    device = next((tensor.device for tensor in weights.values() if tensor.is_cuda), None)
    if device is None:
        raise ValueError("transfer=nccl needs the policy on a GPU: set model.device=cuda, or use transfer=gloo")
    return device
