"""The receiving half of `gloo` and `nccl`: a worker receives into memory of its own, beside its live weights.

From one trainer buckets come straight to where they lie; what the ranks of a trainer have of a bucket comes one after
the other, and is put there row by row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from transfer.agreement import wire
from transfer.agreement.manifest import ALIGNMENT, Entry, Manifest
from transfer.agreement.shards import is_names, is_ranks, local
from transfer.backends.base import Staged
from transfer.backends.buckets import Share, most_bytes, shares_of, unpack
from transfer.backends.group_ends import WorkerGroup, one_gpu
from transfer.backends.process_group import DEPTH, SHARE
from transfer.config import Library, Take
from transfer.memory import regions
from transfer.memory.rows import Rows

MAX_WORLD = 4096
MAX_BUCKET = 2**40  # bytes
NONCE = re.compile(r"[0-9a-f]{32}")


class Block:
    """Bytes for one update, and whether anybody views them: a module's weights, or a broadcast that was given up."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._holders = self._count()

    def is_free(self) -> bool:
        """Whether all is as it was when it was allocated."""
        return self._count() == self._holders

    def _count(self) -> int:
        return torch._C._storage_Use_Count(self.bytes.untyped_storage()._cdata)  # type: ignore[attr-defined]


class CollectiveIntake:
    """A staged update lies in one block of memory of the worker's own, on its module's device."""

    settled = True
    unchecked = False
    slots: Sequence[Staged] = ()  # the memory of an update is not known before
    owner = torch.device("cpu")

    def __init__(self, endpoint: Mapping[str, Any]) -> None:
        self._library = Library(endpoint["backend"])
        self._host = str(endpoint["host"])
        self.in_place = Take(endpoint["take"]) is Take.copy
        self._manifest = Manifest((), 0)
        self._device = self._carrier = torch.device("cpu")  # of the module; of what the library moves
        self._timeout_s = 0.0
        self._blocks: list[
            Block
        ] = []  # one is viewed by the module, with `take=view`; the other is for the next update
        self._group: WorkerGroup | None = None
        self._ranks: OfRanks | None = None  # of a trainer with sharded weights

    def prepare(self, manifest: Manifest, where: Mapping[str, Any], device: torch.device) -> None:
        """Remember what will come; ValueError if this worker cannot be in a group with the trainer."""
        wire.only(dict(where), OF_TRAINER, "where")
        if self._library is Library.nccl:
            if device.type != "cuda":
                raise ValueError(f"transfer=nccl needs the sampler on a GPU (it is on {device}): use transfer=gloo")
            if (own := regions.device_uuid(device)) in where.get("devices", []):
                raise ValueError(one_gpu(f"both are on {own}"))
            self._carrier = device
        ranks = OfRanks(manifest, where["ranks"], where.get("whole", [])) if "ranks" in where else None
        self.close()
        self._manifest, self._device, self._timeout_s = manifest, device, float(where.get("timeout_s", 0.0))
        self._ranks = ranks

    def stage(self, version: int, where: Mapping[str, Any]) -> Staged:
        """Receive one version, together with the other workers of the update."""
        wire.only(dict(where), WHERE, "where")
        missing = sorted(WHERE.keys() - where.keys())
        if missing:
            raise wire.Refused(422, f"where.{missing[0]} is missing")
        ranks = 1 if self._ranks is None else self._ranks.count
        if where["world"] <= ranks:
            raise wire.Refused(422, f"where.world must be more than the {ranks} of the trainer (got {where['world']})")
        if self._group is None or not self._group.usable or self._group.named != (where["port"], where["nonce"]):
            self._leave()
            self._group = WorkerGroup(self._library, self._carrier, self._host, where, ranks)
        try:
            block = self._received(self._group, where["bucket"])
        except BaseException:
            self._leave()
            raise
        whole = {e.name: _view(block[e.offset : e.offset + e.nbytes], e) for e in self._manifest.entries}
        return whole if self._ranks is None else self._ranks.staged(whole)

    def still(self, version: int) -> bool:
        """Always: what is staged is the worker's own."""
        return True

    def close(self) -> None:
        """Leave the group; weights that view the memory keep it."""
        self._leave()
        self._blocks = []

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def _free_block(self) -> torch.Tensor:
        """Memory for one update: what an earlier one has left, if nobody views it, as its first touch is slow."""
        free = next((block for block in self._blocks if block.is_free()), None)
        if free is None:
            free = Block(self._manifest.nbytes, self._device)
            self._blocks = [*self._blocks[-1:], free]
        return free.bytes

    def _received(self, group: WorkerGroup, size: int) -> torch.Tensor:
        block = self._free_block()
        if self._ranks is not None:
            self._receive_shares(group, self._ranks.shares(size), block)
            return block
        parts = [block[start : start + size] for start in range(0, self._manifest.nbytes, size)]
        if self._device == self._carrier:
            group.broadcast(SHARE * self._timeout_s, len(parts), parts.__getitem__)
            return block
        hosts = self._buffers(min(size, self._manifest.nbytes))

        def arrived(index: int, tensor: torch.Tensor) -> None:
            parts[index].copy_(tensor)

        def place(index: int) -> torch.Tensor:
            return hosts[index % DEPTH][: len(parts[index])]

        group.broadcast(SHARE * self._timeout_s, len(parts), place, arrived)
        return block

    def _receive_shares(self, group: WorkerGroup, shares: Sequence[Share], block: torch.Tensor) -> None:
        buffers = self._buffers(most_bytes(shares))
        group.broadcast(
            SHARE * self._timeout_s,
            len(shares),
            lambda index: buffers[index % DEPTH][: shares[index].nbytes],
            lambda index, given: unpack(shares[index], given, block),
            lambda index: shares[index].rank,
        )

    def _buffers(self, size: int) -> list[torch.Tensor]:
        return [torch.empty(size, dtype=torch.uint8, device=self._carrier) for _ in range(DEPTH)]


class OfRanks:
    """What the ranks of a trainer hold of each tensor; ValueError if `whole` names tensors that are not there."""

    def __init__(self, manifest: Manifest, count: int, whole: Collection[str]) -> None:
        if other := sorted(set(whole) - {entry.name for entry in manifest.entries}):
            raise ValueError(f"where.whole names tensors that are not here: {', '.join(other[:10])}")
        self.count = count
        self._manifest, self._whole = manifest, set(whole)
        layouts = [local(manifest, count, rank, self._whole) for rank in range(count)]
        begins = list(accumulate(map(regions.slot_bytes, layouts), initial=0))
        of_ranks = zip(*(layout.entries for layout in layouts), strict=True)
        self._held = {  # of each tensor: how many rows a rank has, and where they would begin, of all that have some
            each[0].name: [
                (mine.shape, begin + mine.offset) for mine, begin in zip(each, begins, strict=False) if mine.nbytes
            ]
            for each in of_ranks
        }
        self._shares: tuple[int, list[Share]] = 0, []

    def shares(self, size: int) -> list[Share]:
        """What comes of whom, in buckets of this size."""
        if self._shares[0] != size:
            self._shares = size, shares_of(self._manifest, size, self.count, self._whole)
        return self._shares[1]

    def staged(self, whole: Mapping[str, torch.Tensor]) -> dict[str, Rows]:
        """Each tensor in one place, as the rows of the ranks, whose sums are over the slots that they would have."""
        return {name: self._rows(tensor, self._held[name]) for name, tensor in whole.items()}

    def _rows(self, tensor: torch.Tensor, held: Sequence[tuple[tuple[int, ...], int]]) -> Rows:
        parts = [tensor] * len(held)
        if len(held) > 1:  # one without dimensions cannot be cut
            parts = list(tensor.split([shape[0] for shape, _ in held]))
        return Rows(tuple(parts), tuple(place for _, place in held), tensor)


def _view(raw: torch.Tensor, entry: Entry) -> torch.Tensor:
    return raw.view(entry.torch_dtype).view(entry.shape)


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 3600.0


OF_TRAINER: dict[str, Callable[[Any], bool]] = {  # for all updates
    "timeout_s": _is_seconds,
    "devices": is_names,
    "ranks": is_ranks,
    "whole": is_names,
}
WHERE: dict[str, Callable[[Any], bool]] = {  # of an update
    "bucket": lambda value: wire.is_int(value) and 0 < value <= MAX_BUCKET and value % ALIGNMENT == 0,
    "port": lambda value: wire.is_int(value) and 0 < value < 2**16,
    "nonce": lambda value: isinstance(value, str) and NONCE.fullmatch(value) is not None,
    "world": lambda value: wire.is_int(value) and 2 <= value <= MAX_WORLD,
}
