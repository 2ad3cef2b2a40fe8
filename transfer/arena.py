"""Backend `ipc`: slots of shared memory; the trainer writes into one that nobody serves, workers view or copy it.

At `init` a worker maps the memory, once per run; an update then says only which slot. With `take=view` the slot becomes
the worker's weights, so a slot may be written again only when no worker serves its version any more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from transfer import memory, wire
from transfer.config import IpcConfig, Take
from transfer.manifest import Manifest

MAX_SLOTS = 64


class ArenaPublisher:
    """The sending half: allocates when the weights are known, on their device, and fills one slot a version."""

    def __init__(self, config: IpcConfig) -> None:
        self._slots = config.slots
        self._server = memory.DescriptorServer()
        self._region: memory.HostRegion | memory.CudaRegion | None = None
        self._views: list[dict[str, torch.Tensor]] = []
        self._versions: list[int | None] = []  # by slot
        self.endpoint: dict[str, Any] = {"backend": "ipc", "take": config.take.value, "socket": self._server.path}

    def prepare(self, manifest: Manifest, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Allocate the slots; what a worker must know to map them."""
        self._drop()
        nbytes = self._slots * memory.slot_bytes(manifest)
        device = next((w.device for w in weights.values() if w.is_cuda), memory.HostRegion.device)
        where: dict[str, Any] = {"slots": self._slots}
        if device.type == "cuda":
            self._region = memory.CudaRegion(nbytes, device)
            where |= {"device": memory.device_uuid(device), "handle": self._region.handle}
        else:
            self._region = memory.HostRegion(nbytes)
            self._server.offer(self._region)
        self._views = [memory.tensors(self._region, manifest, slot) for slot in range(self._slots)]
        self._versions = [None] * self._slots
        return where

    @torch.no_grad()
    def write(self, version: int, weights: Mapping[str, torch.Tensor], served: Collection[int]) -> dict[str, Any]:
        """Copy, and cast, the weights into a slot whose version is not in `served`; which slot it is."""
        free = [slot for slot, held in enumerate(self._versions) if held is None or held not in served]
        assert free, f"all slots are served: {self._versions}"
        slot = free[0]
        self._versions[slot] = version
        views = self._views[slot]
        if views:
            torch._foreach_copy_(list(views.values()), [weights[name] for name in views])
        _wait(views)
        return {"slot": slot}

    def close(self) -> None:
        """Stop sharing; workers keep what they have mapped."""
        self._server.close()
        self._drop()

    def _drop(self) -> None:
        self._views.clear()
        if self._region is not None:
            self._region.close()
            self._region = None


class ArenaIntake:
    """The receiving half: maps the slots once; a staged update is one slot's tensors."""

    def __init__(self, endpoint: Mapping[str, Any]) -> None:
        self._socket = str(endpoint["socket"])
        self.in_place = Take(endpoint["take"]) is Take.copy
        self._region: memory.Region | None = None
        self._views: list[dict[str, torch.Tensor]] = []

    def prepare(self, manifest: Manifest, where: Mapping[str, Any], device: torch.device) -> None:
        """Map the trainer's slots; ValueError if `take=view` cannot put them under a module on `device`."""
        wire.only(dict(where), {"slots": _is_slots, "device": wire.is_str, "handle": wire.is_str}, "where")
        slots = where.get("slots", 0)
        nbytes = slots * memory.slot_bytes(manifest)
        region: memory.Region
        if "handle" in where:
            region = memory.PeerCudaRegion(where.get("device", ""), where["handle"], nbytes)
        else:
            region = memory.receive_region(self._socket, nbytes)
        if not self.in_place and region.device != device:
            raise ValueError(
                f"transfer.take=view needs the sampler on the device of the trainer's slots, {region.device} "
                f"(the sampler is on {device}): use transfer.take=copy"
            )
        self.close()
        self._region = region
        self._views = [memory.tensors(region, manifest, slot) for slot in range(slots)]

    def stage(self, version: int, where: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of the slot that `where` names, by entry name."""
        wire.only(dict(where), {"slot": wire.is_int}, "where")
        if where.get("slot", -1) not in range(len(self._views)):
            raise ValueError(f"where.slot must be below {len(self._views)} (got {where.get('slot')})")
        return self._views[where["slot"]]

    def close(self) -> None:
        """Give up the mapping; weights that view it keep it."""
        self._views = []
        if self._region is not None:
            self._region.close()
            self._region = None


def _is_slots(value: Any) -> bool:
    return wire.is_int(value) and 2 <= value <= MAX_SLOTS


def _wait(views: Mapping[str, torch.Tensor]) -> None:
    """Until the bytes are there: a peer's streams know nothing of ours."""
    for device in {view.device for view in views.values() if view.is_cuda}:
        torch.cuda.synchronize(device)
