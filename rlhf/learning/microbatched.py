"""Optimiser steps on losses of whole batches, each computed by micro-batches that the trainer's ranks share.

What SFT and reward models have in common. A batch that fits in one micro-batch is one pass of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.config import OptimConfig
from rlhf.learning.microbatches import Sizes, split
from rlhf.learning.optimizer import clip_gradients, make_optimizer
from rlhf.learning.spread import Whole

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class MicroBatched:
    """How a model learns beside RL: the optimiser, how many tokens are computed together, and by which ranks."""

    optim: OptimConfig
    tokens: int  # of a micro-batch, at most, padding included
    spread: Whole = Whole()  # noqa: RUF009 - it holds nothing

    def optimizer(self, model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
        """One over all weights of the model that learn."""
        return make_optimizer(model, self.optim, lr)

    def split(self, lengths: Sequence[int]) -> list[list[int]]:
        """Whole rows of these lengths, by number, in micro-batches of at most `tokens`, or one row."""
        return split(Sizes([0], [0] * len(lengths), lengths), range(len(lengths)), self.tokens)

    def step(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: Sequence[list[Part]],
        shares: Callable[[list[Part]], Mapping[str, Tensor]],
    ) -> dict[str, float]:
        """One optimiser step along the sum of `loss` over all parts; sums of all numbers, by name.

        `shares` gives what a part has in the batch's means, `loss` with its gradient, in one pass through the model.
        """
        sums: dict[str, Tensor] = {}  # on the device, so that nobody waits for it between micro-batches
        with self.spread.whole(model):
            mine = self.spread.share(parts)
            for number, (part, counts) in enumerate(mine, start=1):
                if number == len(mine):
                    self.spread.expect_last([model])
                told = shares(part)
                (told["loss"] if counts else told["loss"] * 0.0).backward()
                for name, value in told.items() if counts else ():
                    sums[name] = sums.get(name, 0.0) + value.detach().double()
            self.spread.add_gradients([model], [optimizer])
        clip_gradients(optimizer, self.optim.max_grad_norm, self.spread.over_ranks)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values = torch.stack(list(sums.values())).tolist() if sums else []  # a rank may have no part
        return self.spread.ranks.sums(dict(zip(sums, values, strict=True)))
