"""Gradients, and rows of numbers, added up over the ranks of a trainer: once an update, never averaged.

On the CPU they are added in the order of the ranks, so that two ranks with a micro-batch each get the very bits of one
process with two. NCCL adds in an order of its own, the same each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.ranks.ranks import Ranks

BUCKET = 2**24  # elements that are added at a time


@torch.no_grad()
def add_gradients(optimizers: Sequence[torch.optim.Optimizer], ranks: Ranks) -> None:
    """Give every rank the sum of all ranks' gradients of what the optimisers step; none where no rank has one."""
    if ranks.count == 1:
        return
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    there: set[int] = set().union(*ranks.gathered([n for n, p in enumerate(held) if p.grad is not None]))
    for n in sorted(there):
        if held[n].grad is None:
            held[n].grad = torch.zeros_like(held[n])
    gradients = [grad for n in sorted(there) if (grad := held[n].grad) is not None]
    with ranks.explained():
        if gradients and gradients[0].is_cuda:
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                work.wait()
            return
        for bucket in _buckets(gradients):
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            _add_in_order(flat, ranks.count)
            parts = flat.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket, strict=True)])


def add_rows(rows_BT: Tensor, ranks: Ranks) -> Tensor:
    """The sum of all ranks' tensors, in place; exact where each row is 0 in all ranks but one."""
    if ranks.count > 1:
        with ranks.explained():
            dist.all_reduce(rows_BT)
    return rows_BT


@torch.no_grad()
def take_first_weights(model: torch.nn.Module, ranks: Ranks) -> None:
    """Give all ranks the first one's weights: what each has trained by itself may differ in its last bits on a GPU."""
    if ranks.count == 1:
        return
    with ranks.explained():
        for parameter in model.parameters():
            held = parameter.contiguous()
            dist.broadcast(held, 0)
            if held is not parameter:
                parameter.copy_(held)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, in order, of about BUCKET elements together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(held.numel() for held in bucket) + tensor.numel() > BUCKET
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _add_in_order(flat: Tensor, count: int) -> None:
    """The sum over the ranks, in place."""
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % count))
    mine = add_in_order(padded, count)
    shares = list(torch.empty_like(padded).chunk(count))
    dist.all_gather(shares, mine)
    flat.copy_(torch.cat(shares)[: len(flat)])


def add_in_order(flat: Tensor, count: int, group: Any = None) -> Tensor:
    """This rank's share, of `count` equal ones, of the sum over the ranks (of this group), added in their order."""
    got = torch.empty_like(flat)
    dist.all_to_all_single(got, flat, group=group)
    mine, *others = got.chunk(count)
    for other in others:
        mine += other
    return mine
