"""Shards of which a decoder layer is whole only while a pass is in it: FSDP2 as it comes.

A pass gathers layer after layer, and drops each when it leaves it; a backward pass gathers it again and adds up its
gradients over the ranks. All ranks wait for each other in every layer, so that all have to compute as many
micro-batches, each of as many passes (passes.py): a rank that has fewer computes one row of another, which counts
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule

from rlhf.learning.spread import Optimizers, Part, Sharded, different, forget_passes, groups_of
from rlhf.ranks.ranks import Ranks


class ByLayer(Sharded):
    """Every rank has its rows of all, and of whole weights the root's and those of a layer or two.

    `reshard`: whether a layer is dropped between its forward and its backward pass.
    """

    lockstep = True

    def __init__(self, ranks: Ranks, device: torch.device, reshard: bool = True, offload: bool = False) -> None:
        super().__init__(ranks, device, offload)
        self._reshard = reshard

    def share(self, parts: Sequence[list[Part]]) -> Sequence[tuple[list[Part], bool]]:
        """What this rank computes of the parts, and whether that counts: as many in every rank."""
        mine = super().share(parts)
        missing = -(-len(parts) // self.ranks.count) - len(mine)
        return [*mine, *((parts[-1][:1], False) for _ in range(missing))]

    @contextmanager
    def whole(self, *models: torch.nn.Module | None) -> Iterator[None]:
        """Around whatever is computed with these models, gradients included; in the end all is dropped."""
        try:
            with self.ranks.explained():
                yield
        finally:
            for model in different(models):
                for group in groups_of(model):
                    group.reshard()
                    forget_passes(group)

    def expect_last(self, models: Sequence[torch.nn.Module]) -> None:
        """Gradients are added up in each backward pass."""

    def add_gradients(self, models: Sequence[torch.nn.Module], optimizers: Optimizers) -> None:
        """They have been, in each backward pass."""

    def _drops_layers(self) -> bool:
        return self._reshard

    def _set(self, group: FSDPModule) -> None:
        """As FSDP has it."""
