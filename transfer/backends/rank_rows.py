"""What one rank of a trainer with sharded weights holds of each tensor, as every backend sends it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch

from transfer.agreement.dtensor import is_dtensor, local_part
from transfer.agreement.manifest import Manifest
from transfer.agreement.shards import local
from transfer.backends.base import Weights

Together = Callable[[Mapping[str, Any], Weights], list[Any]]  # a step, by all ranks at once: what each says


def is_shard(tensor: Any) -> bool:
    """Whether other ranks hold other rows of this tensor: a DTensor, and not the same in all ranks."""
    return is_dtensor(tensor) and not all(placement.is_replicate() for placement in tensor.placements)


def check_placements(weights: Weights, number: int, count: int, hosts: int) -> None:
    """ValueError, with a name, unless each DTensor is sharded on dim 0 over a host's ranks in order, or not at all.

    This is rank `number` of `count`; each of `hosts` hosts holds all rows.
    """
    shape = (count,) if hosts == 1 else (hosts, count // hosts)
    for name, tensor in weights.items():
        if not is_shard(tensor):
            continue
        mesh, placements = cast("Any", tensor).device_mesh, cast("Any", tensor).placements
        in_order = (
            tuple(mesh.shape) == shape and tuple(mesh.get_coordinate()) == divmod(number, shape[-1])[-mesh.ndim :]
        )
        *copies, rows = placements
        if not (in_order and rows.is_shard(0) and all(each.is_replicate() for each in copies)):
            of_hosts = f", {hosts} hosts with all rows each" if hosts > 1 else ""
            raise ValueError(
                f"{name} must be sharded on dim 0 over the {count} ranks, in their order{of_hosts} (it is {placements} "
                f"over a mesh of {list(mesh.shape)}, here {mesh.get_coordinate()})"
            )


class RowsOfRank:
    """The rows of rank `number` of `count`, of weights that `prepare` was told of; `layout` is what it holds."""

    def __init__(self, number: int, count: int) -> None:
        self.number, self.count = number, count
        self.layout = Manifest((), 0)
        self.whole: set[str] = set()  # the names of tensors that are not sharded

    def prepare(self, manifest: Manifest, whole: Collection[str], weights: Weights) -> None:
        """From now on of these weights; ValueError if this rank holds others."""
        self.layout, self.whole = local(manifest, self.count, self.number, whole), set(whole)
        if weights.keys() != manifest.by_name.keys():
            other = sorted(weights.keys() ^ manifest.by_name.keys())
            raise ValueError(f"it has other weights than the first rank: {', '.join(other[:10])}")
        self.held(weights)

    @torch.no_grad()
    def held(self, weights: Weights) -> dict[str, torch.Tensor]:
        """This rank's rows, by entry, if it has any; ValueError if they are not those that the manifest gives to it."""
        held = {}
        for entry in self.layout.entries:
            if entry.name in self.whole and self.number:
                continue
            tensor = weights[entry.name]
            mine = local_part(tensor)
            if mine.shape != entry.shape or is_shard(tensor) is (entry.name in self.whole):
                raise ValueError(f"it holds {list(mine.shape)} of {entry.name}, not {list(entry.shape)}")
            if mine.numel():
                held[entry.name] = mine
        if len({tensor.device for tensor in held.values()}) > 1:  # shards in the host's memory, buffers on the GPU
            held = {name: tensor.cpu() for name, tensor in held.items()}
        return held


def not_sharded(manifest: Manifest, weights: Weights) -> list[str]:
    """The names of entries that every rank has alike, and the first sends."""
    return [entry.name for entry in manifest.entries if not is_shard(weights[entry.name])]
