"""The memory of `ipc`: slots that each hold the weights of one version, of the trainer or of each of its ranks."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from transfer.agreement.manifest import Manifest
from transfer.agreement.shards import local
from transfer.memory import regions
from transfer.memory.descriptors import DescriptorServer, receive_region
from transfer.memory.mark import MARK_BYTES, Mark
from transfer.memory.rows import Rows

LOG = logging.getLogger(__name__)
OPEN_TO_WRITERS = (
    "this kernel cannot seal shared memory against writing (F_SEAL_FUTURE_WRITE, Linux 5.1): another process "
    "of this user could change the weights that workers serve"
)


class Slots:
    """The trainer's shared memory: on the device of its weights, as many slots as asked for."""

    def __init__(self) -> None:
        self._server = DescriptorServer()
        self._regions: list[regions.Region] = []  # of the slots, and behind it the mark's, if they are on a GPU
        self.device = regions.HostRegion.device
        self.socket = self._server.path
        self.views: list[dict[str, torch.Tensor]] = []
        self.mark: Mark | None = None  # of slots that change without a word to the workers

    def allocate(
        self, manifest: Manifest, weights: Mapping[str, torch.Tensor], count: int, marked: bool = False
    ) -> dict[str, Any]:
        """Allocate `count` slots in place of the ones before; what a worker must know to map them."""
        self._drop()
        nbytes, marks = count * regions.slot_bytes(manifest), MARK_BYTES * marked
        self.device = next((w.device for w in weights.values() if w.is_cuda), regions.HostRegion.device)
        where: dict[str, Any] = {"slots": count}
        if self.device.type == "cuda":
            on_gpu = regions.CudaRegion(nbytes, self.device)
            self._regions.append(on_gpu)
            where |= {"device": regions.device_uuid(self.device), "handle": on_gpu.handle}
            if marked:
                self.mark = Mark(self._shared(marks))
                where["mark"] = self.socket  # also for workers that were started before this trainer
        else:
            on_host = self._shared(nbytes + marks)
            self.mark = Mark(on_host) if marked else None
        self.views = [regions.tensors(self._regions[0], manifest, slot) for slot in range(count)]
        return where

    def _shared(self, nbytes: int) -> regions.HostRegion:
        """Host memory that workers get."""
        region = regions.HostRegion(nbytes)
        self._regions.append(region)
        if not region.sealed:
            LOG.warning(OPEN_TO_WRITERS)
        self._server.offer(region)
        return region

    def close(self) -> None:
        """Stop sharing; workers, and whoever holds a tensor of it, keep what they have."""
        self._server.close()
        self._drop()

    def _drop(self) -> None:
        self.views, self.mark = [], None
        for region in self._regions:
            region.close()
        self._regions = []


class SlotsOfRanks:
    """All ranks' slots, `mapped`, a region a rank: a tensor in one of `slots` is the rows that lie with each rank."""

    def __init__(
        self, mapped: Sequence[regions.Region], manifest: Manifest, count: int, whole: Collection[str]
    ) -> None:
        self._regions = list(mapped)
        layouts = [local(manifest, len(mapped), rank, whole) for rank in range(len(mapped))]
        self._begins = list(accumulate(map(regions.slot_bytes, layouts), initial=0))
        self.slots = [self._joined(manifest, layouts, slot) for slot in range(count)]

    @classmethod
    def of_host(cls, sockets: Sequence[str], manifest: Manifest, count: int, whole: Collection[str]) -> SlotsOfRanks:
        """Mapped from what the ranks offer at `sockets`."""
        sizes = _sizes(manifest, len(sockets), count, whole)
        return cls(list(map(receive_region, sockets, sizes)), manifest, count, whole)

    @classmethod
    def of_gpus(
        cls,
        places: Sequence[Mapping[str, str]],
        manifest: Manifest,
        count: int,
        whole: Collection[str],
        reader: torch.device,
    ) -> SlotsOfRanks:
        """Opened by `reader` from `places`, a GPU and a handle a rank; ValueError."""
        sizes = _sizes(manifest, len(places), count, whole)
        mapped = [
            regions.PeerCudaRegion(place["device"], place["handle"], size, reader)
            for place, size in zip(places, sizes, strict=True)
        ]
        return cls(mapped, manifest, count, whole)

    def _joined(self, manifest: Manifest, layouts: Sequence[Manifest], slot: int) -> dict[str, Rows]:
        held = [regions.tensors(region, layout, slot) for region, layout in zip(self._regions, layouts, strict=True)]
        joined = {}
        for entry in manifest.entries:
            of_ranks = zip(held, layouts, self._begins, strict=False)
            found = [(views[entry.name], begin + of.by_name[entry.name].offset) for views, of, begin in of_ranks]
            found = [(part, place) for part, place in found if part.numel()]
            joined[entry.name] = Rows(tuple(part for part, _ in found), tuple(place for _, place in found))
        return joined

    def close(self) -> None:
        """Give up the mappings."""
        self.slots = []
        for region in self._regions:
            region.close()


def begin_of(manifest: Manifest, ranks: int, rank: int, whole: Collection[str]) -> int:
    """Where a rank's slot begins in the slots of all ranks, one behind the other, bytes."""
    return sum(regions.slot_bytes(local(manifest, ranks, before, whole)) for before in range(rank))


def _sizes(manifest: Manifest, ranks: int, count: int, whole: Collection[str]) -> list[int]:
    """Bytes of the region of each rank."""
    return [count * regions.slot_bytes(local(manifest, ranks, rank, whole)) for rank in range(ranks)]
