"""Backend `ipc` of a trainer of several ranks with sharded weights: each writes its own rows, and nobody gathers them.

    Shards           in every rank: its slots, and how its rows get there
    ShardPublisher   in the first rank, for its session: lets all ranks write

The digest is, on the host, that of the whole tensors, which the first rank reads once from all ranks' memory. On GPUs
it is sums over the slots of all ranks, one behind the other: each rank sums its own as it writes, and they are added.

Which rows a rank has follows from the manifest (agreement/shards.py). A worker maps the slots of all ranks and copies
rows from each straight into its parameters (slots.py, memory/rows.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from transfer.agreement.dtensor import any_dtensor, local_part
from transfer.agreement.manifest import Manifest
from transfer.backends.arena import ArenaPublisher
from transfer.backends.base import Weights
from transfer.backends.rank_rows import RowsOfRank, Together, not_sharded
from transfer.backends.slots import Slots, SlotsOfRanks, begin_of
from transfer.config import IpcConfig
from transfer.memory.digest import Hasher
from transfer.memory.finite import NotFinite, not_finite
from transfer.memory.one_pass import OnePass, available
from transfer.memory.rows import parts_of
from transfer.memory.sums import added, sums_of

OF_HOSTS = "of_hosts"  # in the endpoint: the sockets of each host's ranks


def endpoint_of_host(endpoint: Mapping[str, Any], host: int) -> dict[str, Any]:
    """What a worker on this one of the trainer's hosts must be told: it maps the memory of the ranks that are there."""
    told = dict(endpoint)
    of_hosts = told.pop(OF_HOSTS, None)
    return told if of_hosts is None else told | {"sockets": of_hosts[host], "host": host}


class Shards:
    """What rank `number` of `count` holds of every tensor, and its slots for it, in memory that workers map."""

    def __init__(self, number: int, count: int) -> None:
        self._rows = RowsOfRank(number, count)
        self._begin = 0  # of its slot among those of all ranks
        self._passes: dict[int, OnePass] = {}  # by slot
        self.slots = Slots()

    @property
    def socket(self) -> str:
        """Where workers get the memory."""
        return self.slots.socket

    def carry_out(self, step: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        """This rank's part of a step: for `prepare` where its slots are, for `write` what it has found (`_write`)."""
        if step["do"] == "write":
            return self._write(step["slot"], weights, step["digest"])
        return self._prepare(Manifest.from_json(step["manifest"]), step["slots"], step["whole"], weights)

    def release(self) -> None:
        """Nothing is read of the weights once they are written."""

    def close(self) -> None:
        """Stop sharing; workers keep what they have mapped."""
        self._passes = {}
        self.slots.close()

    def _prepare(self, manifest: Manifest, slots: int, whole: Collection[str], weights: Weights) -> dict[str, Any]:
        self._passes = {}
        self._rows.prepare(manifest, whole, weights)
        self._begin = begin_of(manifest, self._rows.count, self._rows.number, whole)
        held = {name: local_part(each) for name, each in weights.items() if name not in self._rows.whole}
        return self.slots.allocate(self._rows.layout, held, slots)  # on the host, if shards are there

    @torch.no_grad()
    def _write(self, slot: int, weights: Weights, with_digest: bool) -> dict[str, Any]:
        """The first tensor whose rows here are not all finite, `bad`, and of rows on a GPU the `sums`, if wanted."""
        held = self._rows.held(weights)
        if available(self.slots.device):
            sums, finite = self._pass(slot, held).run(with_digest)
            bad = None if finite else not_finite(held, self._rows.layout) or next(iter(held))
            return {"bad": bad, "sums": sums}
        bad = not_finite(held, self._rows.layout)
        views = {name: self.slots.views[slot][name] for name in held}
        if bad is None:
            for name, tensor in held.items():
                views[name].copy_(tensor)
        if self.slots.device.type != "cuda":
            return {"bad": bad, "sums": None}
        torch.cuda.synchronize(self.slots.device)
        return {"bad": bad, "sums": sums_of(list(views.values()), self._places(views)) if with_digest else None}

    def _pass(self, slot: int, held: Mapping[str, torch.Tensor]) -> OnePass:
        """Copies, casts, sums and looks at this rank's rows at once."""
        sources, device = list(held.values()), self.slots.device
        if slot not in self._passes or not self._passes[slot].fits(sources):
            targets = [self.slots.views[slot][name] for name in held]
            self._passes[slot] = OnePass(sources, targets, device, offsets=self._places(held))
        torch.cuda.synchronize(device)  # other streams may have changed the weights
        return self._passes[slot]

    def _places(self, names: Iterable[str]) -> list[int]:
        return [self._begin + self._rows.layout.by_name[name].offset for name in names]


class ShardPublisher(ArenaPublisher):
    """The first rank's sending half; whole weights, which all ranks have alike, it writes alone."""

    takes_shards = True

    def __init__(
        self, config: IpcConfig, shards: Shards, sockets: Sequence[str], together: Together, hosts: int = 1
    ) -> None:
        super().__init__(config, shards.slots)
        holders = len(sockets) // hosts
        of_hosts = [list(sockets[first : first + holders]) for first in range(0, len(sockets), holders)]
        self._sockets = of_hosts[0]
        self._ranks = len(sockets)
        self._together = together
        self._sharded = False
        self._on_host: SlotsOfRanks | None = None  # mapped here: what all ranks have written
        self._order: dict[str, int] = {}  # of the entries
        self.endpoint |= {"sockets": self._sockets}
        if hosts > 1:
            self.endpoint |= {OF_HOSTS: of_hosts}

    def prepare(self, manifest: Manifest, weights: Weights) -> dict[str, Any]:
        """Let all ranks allocate slots for their rows; what a worker must know to map them."""
        self._drop()
        if not any_dtensor(weights.values()):
            return super().prepare(manifest, weights)
        whole = not_sharded(manifest, weights)
        self._versions, self.finds_nonfinite = [None] * self._count, True
        step = {"do": "prepare", "manifest": manifest.to_json(), "slots": self._count, "whole": whole}
        on_gpus = [each for each in self._together(step, weights) if "handle" in each]
        where = {"slots": self._count, "ranks": len(self._sockets), "whole": whole}
        self._sharded = True
        self._order = {entry.name: index for index, entry in enumerate(manifest.entries)}
        if not on_gpus:
            self._on_host = SlotsOfRanks.of_host(self._sockets, manifest, self._count, whole)
            return where
        if len(on_gpus) < self._ranks:
            raise ValueError("all ranks must hold their weights on a GPU, or none of them")
        return where | {"regions": [{"device": each["device"], "handle": each["handle"]} for each in on_gpus]}

    def write(
        self, version: int, weights: Weights, served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]:
        """Let all ranks copy, and cast, their rows into a slot whose version is not in `served`; NotFinite."""
        if not self._sharded:
            return super().write(version, weights, served, with_digest)
        slot = self._take_slot(version, served)
        found = self._together({"do": "write", "slot": slot, "digest": with_digest}, weights)
        if bad := [each["bad"] for each in found if each["bad"] is not None]:
            raise NotFinite(tensor=min(bad, key=self._order.__getitem__))
        if not with_digest:
            return {"slot": slot}, None
        if self._on_host is not None:
            return {"slot": slot}, _digest(self._on_host, slot)
        return {"slot": slot}, added(each["sums"] for each in found[: len(self._sockets)])

    def close(self) -> None:
        """Stop sharing; workers keep what they have mapped."""
        self._drop()
        super().close()

    def _drop(self) -> None:
        self._sharded, self._passes = False, {}
        if self._on_host is not None:
            self._on_host.close()
            self._on_host = None


def _digest(ranks: SlotsOfRanks, slot: int) -> str:
    """Of all ranks' rows, tensor by tensor: the one that the whole tensors have."""
    hasher = Hasher()
    for part in parts_of(ranks.slots[slot].values()):
        hasher.add(part)
    return hasher.digest()
