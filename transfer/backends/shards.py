"""Backend `ipc` of a trainer of several ranks with sharded weights: each writes its own rows, and nobody gathers them.

    Shards           in every rank: its slots, and how its rows get there
    ShardPublisher   in the first rank, for its session: lets all ranks write, and reads what they have written once,
                     for the digest, which is that of the whole tensors

Which rows a rank has follows from the manifest (agreement/shards.py). A worker maps the slots of all ranks and copies
rows from each straight into its parameters (slots.py, memory/rows.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch

from transfer.agreement.dtensor import any_dtensor, is_dtensor, local_part
from transfer.agreement.manifest import Manifest
from transfer.agreement.shards import local
from transfer.backends.arena import ArenaPublisher
from transfer.backends.base import Weights
from transfer.backends.slots import Slots, SlotsOfRanks
from transfer.config import IpcConfig
from transfer.memory.digest import Hasher
from transfer.memory.finite import NotFinite, not_finite
from transfer.memory.rows import parts_of

Together = Callable[[Mapping[str, Any], Weights], list[Any]]  # a step, by all ranks at once: what each says


def is_shard(tensor: Any) -> bool:
    """Whether other ranks hold other rows of this tensor: a DTensor, and not the same in all ranks."""
    return is_dtensor(tensor) and not all(placement.is_replicate() for placement in tensor.placements)


def check_placements(weights: Weights, ranks: int, rank: int) -> None:
    """ValueError, with a name, unless each DTensor is sharded on dim 0 over all ranks in their order, or not at all."""
    for name, tensor in weights.items():
        if not is_shard(tensor):
            continue
        mesh, placements = cast("Any", tensor).device_mesh, cast("Any", tensor).placements
        over_all = mesh.ndim == 1 and mesh.size() == ranks and mesh.get_local_rank() == rank
        if not (over_all and placements[0].is_shard(0)):
            raise ValueError(
                f"{name} must be sharded on dim 0 over the {ranks} ranks, in their order (it is {placements} over a "
                f"mesh of {list(mesh.shape)}, here {mesh.get_coordinate()})"
            )


class Shards:
    """What rank `number` of `count` holds of every tensor, and its slots for it, in memory that workers map."""

    def __init__(self, number: int, count: int) -> None:
        self._number = number
        self._count = count
        self._manifest = Manifest((), 0)  # of what this rank holds
        self._whole: set[str] = set()
        self.slots = Slots()

    @property
    def socket(self) -> str:
        """Where workers get the memory."""
        return self.slots.socket

    def carry_out(self, step: Mapping[str, Any], weights: Weights) -> str | None:
        """This rank's part of a step; of `write` the first tensor whose rows here are not all finite."""
        if step["do"] == "write":
            return self._write(step["slot"], weights)
        self._prepare(Manifest.from_json(step["manifest"]), step["slots"], step["whole"], weights)
        return None

    def close(self) -> None:
        """Stop sharing; workers keep what they have mapped."""
        self.slots.close()

    def _prepare(self, manifest: Manifest, slots: int, whole: Collection[str], weights: Weights) -> None:
        self._manifest = local(manifest, self._count, self._number, whole)
        self._whole = set(whole)
        if weights.keys() != manifest.by_name.keys():
            other = sorted(weights.keys() ^ manifest.by_name.keys())
            raise ValueError(f"it has other weights than the first rank: {', '.join(other[:10])}")
        self._held(weights)
        self.slots.allocate(self._manifest, {}, slots)

    @torch.no_grad()
    def _write(self, slot: int, weights: Weights) -> str | None:
        held = self._held(weights)
        bad = not_finite(held, self._manifest)
        if bad is None:
            views = self.slots.views[slot]
            for name, tensor in held.items():
                views[name].copy_(tensor)
        return bad

    @torch.no_grad()
    def _held(self, weights: Weights) -> dict[str, torch.Tensor]:
        """This rank's rows, by entry; ValueError if they are not those that the manifest gives to it."""
        held = {}
        for entry in self._manifest.entries:
            if entry.name in self._whole and self._number:
                held[entry.name] = torch.empty(entry.shape)  # no rows
                continue
            tensor = weights[entry.name]
            mine = held[entry.name] = local_part(tensor)
            if mine.shape != entry.shape or is_shard(tensor) is (entry.name in self._whole):
                raise ValueError(f"it holds {list(mine.shape)} of {entry.name}, not {list(entry.shape)}")
        return held


class ShardPublisher(ArenaPublisher):
    """The first rank's sending half; whole weights, which all ranks have alike, it writes alone."""

    takes_shards = True

    def __init__(self, config: IpcConfig, shards: Shards, sockets: Sequence[str], together: Together) -> None:
        super().__init__(config, shards.slots)
        self._sockets = list(sockets)
        self._together = together
        self._ranks: SlotsOfRanks | None = None  # of weights that are sharded
        self._order: dict[str, int] = {}  # of the entries
        self.endpoint |= {"sockets": self._sockets}

    def prepare(self, manifest: Manifest, weights: Weights) -> dict[str, Any]:
        """Let all ranks allocate slots for their rows; what a worker must know to map them."""
        self._drop()
        if not any_dtensor(weights.values()):
            return super().prepare(manifest, weights)
        whole = [entry.name for entry in manifest.entries if not is_shard(weights[entry.name])]
        self._versions, self.finds_nonfinite = [None] * self._count, True
        step = {"do": "prepare", "manifest": manifest.to_json(), "slots": self._count, "whole": whole}
        self._together(step, weights)
        self._ranks = SlotsOfRanks(self._sockets, manifest, self._count, whole)
        self._order = {entry.name: index for index, entry in enumerate(manifest.entries)}
        return {"slots": self._count, "ranks": len(self._sockets), "whole": whole}

    def write(
        self, version: int, weights: Weights, served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]:
        """Let all ranks copy, and cast, their rows into a slot whose version is not in `served`; NotFinite."""
        if self._ranks is None:
            return super().write(version, weights, served, with_digest)
        slot = self._take_slot(version, served)
        found = self._together({"do": "write", "slot": slot}, weights)
        if bad := [name for name in found if name is not None]:
            raise NotFinite(tensor=min(bad, key=self._order.__getitem__))
        return {"slot": slot}, _digest(self._ranks, slot) if with_digest else None

    def close(self) -> None:
        """Stop sharing; workers keep what they have mapped."""
        self._drop()
        super().close()

    def _drop(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None


def _digest(ranks: SlotsOfRanks, slot: int) -> str:
    """Of all ranks' rows, tensor by tensor: the one that the whole tensors have."""
    hasher = Hasher()
    for part in parts_of(ranks.slots[slot].values()):
        hasher.add(part)
    return hasher.digest()
