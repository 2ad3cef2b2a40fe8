"""Gradients that real ranks add up are those of one process that adds in their order, to the bit."""

from __future__ import annotations

import pytest
import torch
from forked_ranks import pool

from rlhf.learning import gradient_sums
from rlhf.learning.gradient_sums import add_gradients
from rlhf.ranks.ranks import ALONE, Ranks

SHAPES = [(3, 5), (7,), (1, 1), (0, 4), (2, 2, 2), (64, 3), (5,), ()]
BFLOAT16 = {4}  # parameters of another dtype, among the others
NOBODY = {6}  # has a gradient
ONE_ALONE = {1: 0, 3: 1, 5: 1}  # parameter -> the only rank that has one


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request):
    with pool(request.param) as made:
        yield request.param, made


def gradient(rank: int, n: int, idle: int | None) -> torch.Tensor | None:
    """What a rank has of the n-th parameter; a rank that is idle has none of any."""
    if n in NOBODY or rank == idle or ONE_ALONE.get(n, rank) != rank:
        return None
    generator = torch.Generator().manual_seed(100 * n + rank)
    drawn = torch.randn(SHAPES[n], generator=generator) * 10 ** (rank - 1)
    return drawn.to(torch.bfloat16 if n in BFLOAT16 else torch.float32)


def parameters(rank: int, idle: int | None) -> list[torch.nn.Parameter]:
    made = []
    for n, shape in enumerate(SHAPES):
        made.append(torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16 if n in BFLOAT16 else torch.float32)))
        made[-1].grad = gradient(rank, n, idle)
    return made


def in_order(count: int, idle: int | None) -> list[torch.Tensor | None]:
    """The sums that one process makes."""
    sums: list[torch.Tensor | None] = []
    for n in range(len(SHAPES)):
        held = [gradient(rank, n, idle) for rank in range(count)]
        total: torch.Tensor | None = None
        for each in held:
            if each is not None:
                total = each.clone() if total is None else total + each
        sums.append(total)
    return sums


def _added(ranks: Ranks, idle: int | None, bucket: int) -> list[torch.Tensor | None]:
    held = parameters(ranks.number, idle)
    optimizers = [
        torch.optim.SGD(held[:3], lr=1.0),
        torch.optim.SGD([{"params": held[3:5]}, {"params": held[5:]}], lr=1.0),
    ]
    before, gradient_sums.BUCKET = gradient_sums.BUCKET, bucket
    try:
        add_gradients(optimizers, ranks)
    finally:
        gradient_sums.BUCKET = before
    return [p.grad for p in held]


@pytest.mark.parametrize("bucket", [20, 2**24], ids="buckets of {}".format)
@pytest.mark.parametrize("idle", [None, 0], ids="without rows: {}".format)
def test_gradients_are_summed_in_the_order_of_the_ranks_and_never_averaged(ranks, idle, bucket):
    count, made = ranks
    expected = in_order(count, idle)
    for each in made.call(_added, idle, bucket):
        for n, (ours, sum_of_all) in enumerate(zip(each, expected, strict=True)):
            assert (ours is None) == (sum_of_all is None), n
            assert ours is None or (ours.dtype == sum_of_all.dtype and torch.equal(ours, sum_of_all)), n
    assert expected[6] is None and any(each is not None for each in expected)


def _nothing(ranks: Ranks) -> list[torch.Tensor | None]:
    held = [torch.nn.Parameter(torch.ones(2))]
    add_gradients([torch.optim.SGD(held, lr=1.0)], ranks)
    return [p.grad for p in held]


def test_where_no_rank_has_a_gradient_none_is_made_up(ranks):
    count, made = ranks
    assert made.call(_nothing) == count * [[None]]


def _order_shows(ranks: Ranks) -> float:
    held = torch.nn.Parameter(torch.zeros(1))
    held.grad = torch.tensor([[1e8, 1.0, -1e8][ranks.number]])
    add_gradients([torch.optim.SGD([held], lr=1.0)], ranks)
    return float(held.grad)


def test_the_order_is_that_of_the_ranks_also_where_another_gives_another_sum():
    with pool(3) as made:
        assert made.call(_order_shows) == [0.0] * 3, "(1e8 + 1) - 1e8 in fp32; any other order gives 1"


def test_one_process_keeps_its_gradients_as_they_are():
    held = parameters(0, None)
    before = [p.grad for p in held]
    add_gradients([torch.optim.SGD(held, lr=1.0)], ALONE)
    assert all(p.grad is each for p, each in zip(held, before, strict=True))
