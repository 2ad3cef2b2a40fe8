"""What is stepped: the model's own weights in fp32, fp32 masters of coarser ones; clipping."""

import copy
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import AdamWConfig
from rlhf.learning.optimizer import adamw, clip_gradients, make_optimizer


def model_of(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3).to(dtype)


def constant_pull(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps of `lr` each: AdamW divides a constant gradient by itself."""
    for _ in range(steps):
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("masters", "moved"), [(True, 4e-3), (False, 0.0)])
def test_a_step_of_a_millionth_survives_in_bfloat16_by_its_master_only(masters, moved):
    model = model_of(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    constant_pull(model, make_optimizer(model, AdamWConfig(master_weights=masters), lr=1e-6), steps=4000)
    assert model.weight.dtype == torch.bfloat16
    assert 1.0 - float(model.weight.detach().mean()) == pytest.approx(moved, abs=1e-4)


def test_fp32_weights_are_stepped_themselves():
    model = model_of(torch.float32)
    stepped = make_optimizer(model, AdamWConfig(), lr=1e-3).param_groups[0]["params"]
    assert [id(p) for p in stepped] == [id(p) for p in model.parameters()]


def test_bfloat16_weights_are_their_masters_rounded_and_masters_go_the_way_of_fp32_weights():
    coarse, fine = model_of(torch.bfloat16), model_of(torch.float32)
    fine.load_state_dict(coarse.state_dict())
    optimizers = [make_optimizer(model, AdamWConfig(), lr=1e-2) for model in (coarse, fine)]
    for model, optimizer in zip((coarse, fine), optimizers, strict=True):
        constant_pull(model, optimizer, steps=20)
    for mine, master, theirs in zip(
        coarse.parameters(), optimizers[0].param_groups[0]["params"], fine.parameters(), strict=True
    ):
        assert torch.equal(mine, master.bfloat16()) and torch.equal(master, theirs)


def test_gradients_of_many_micro_batches_are_added_up_in_fp32():
    model = model_of(torch.bfloat16)
    optimizer = make_optimizer(model, AdamWConfig(), lr=1e-3)
    for _ in range(2048):
        (sum(p.sum() for p in model.parameters()) / 2048).backward()
    for master in optimizer.param_groups[0]["params"]:
        assert torch.allclose(master.grad, torch.ones_like(master), rtol=1e-3)
    assert all(p.grad is None for p in model.parameters()), "one gradient is kept, not two"


def test_masters_and_hooks_go_with_their_optimiser_and_copies_of_a_model_have_none():
    model = model_of(torch.bfloat16)
    first = make_optimizer(model, AdamWConfig(), lr=1e-3)
    master = weakref.ref(first.param_groups[0]["params"][0])
    twin = copy.deepcopy(model)
    sum(p.sum() for p in twin.parameters()).backward()
    assert first.param_groups[0]["params"][0].grad is None and twin.weight.grad is not None
    del first
    assert master() is None
    second = make_optimizer(model, AdamWConfig(), lr=1e-3)
    constant_pull(model, second, steps=1)
    assert torch.equal(model.weight, second.param_groups[0]["params"][0].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_scaled_to_the_largest_norm_and_the_norm_before_is_told(dtype):
    model = model_of(dtype)
    optimizer = make_optimizer(model, AdamWConfig(), lr=1e-3)
    (2 * sum(p.sum() for p in model.parameters())).backward()
    gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
    assert clip_gradients(optimizer, 100.0) == pytest.approx(2 * 15**0.5)
    assert all(bool((g == 2).all()) for g in gradients), "short ones stay"
    assert clip_gradients(optimizer, 0.5) == pytest.approx(2 * 15**0.5)
    assert float(torch.cat([g.flatten() for g in gradients]).norm()) == pytest.approx(0.5, rel=1e-4)


def test_weights_that_do_not_learn_are_not_stepped():
    model = model_of(torch.float32)
    model.bias.requires_grad_(False)
    (stepped,) = make_optimizer(model, AdamWConfig(weight_decay=1.0), lr=1e-3).param_groups[0]["params"]
    assert stepped is model.weight


@settings(deadline=None, max_examples=30)
@given(pieces=st.integers(1, 7), seed=st.integers(0, 1000), large=st.booleans())
def test_the_norm_and_the_clipped_gradients_do_not_depend_on_how_tensors_are_split(pieces, seed, large):
    values = torch.randn(999, generator=torch.Generator().manual_seed(seed)) * (1e4 if large else 1e-4)
    outcomes = []
    for parts in (values.split(999), values.tensor_split(pieces)):
        parameters = [torch.nn.Parameter(torch.zeros_like(part)) for part in parts]
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.clone()
        norm = clip_gradients(torch.optim.SGD(parameters, lr=1.0), 1.0)
        outcomes.append((norm, torch.cat([parameter.grad for parameter in parameters])))
    (whole, clipped), (split, also) = outcomes
    assert whole == split and torch.equal(clipped, also)
    assert whole == pytest.approx(float(values.double().norm()), rel=1e-7)
    assert float(clipped.norm()) == pytest.approx(min(1.0, whole), rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_norm_of_gradients_that_are_not_finite_is_not_finite(value):
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, value, 2.0])
    assert not math.isfinite(clip_gradients(torch.optim.SGD([parameter], lr=1.0), 1.0))


def test_the_squares_of_other_ranks_count_in_the_norm():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 0.0])
    assert clip_gradients(torch.optim.SGD([parameter], lr=1.0), 1.0, lambda squares: squares + 16.0) == 5.0
    assert parameter.grad[0] == pytest.approx(0.6, rel=1e-5)


@pytest.mark.parametrize("shape", [(37,), (37, 3), (37, 100), (37, 64)])
def test_what_a_step_makes_of_a_row_does_not_depend_on_the_rows_beside_it(shape):
    def stepped(parts: list[int]) -> torch.Tensor:
        """20 steps of a tensor whose rows are in so many parts."""
        draw = torch.Generator().manual_seed(0)
        names = [f"part {number}" for number in range(len(parts))]
        held = [part.clone().requires_grad_() for part in torch.randn(shape, generator=draw).split(parts)]
        optimizer = adamw(AdamWConfig(), list(zip(names, held, strict=True)), lr=1e-2)
        for step in range(20):
            gradients = torch.randn(shape, generator=draw) * 10.0 ** -(step % 4)
            for part, gradient in zip(held, gradients.split(parts), strict=True):
                part.grad = gradient.clone()
            optimizer.step()
        return torch.cat([part.detach() for part in held])

    for parts in ([13, 13, 11], [19, 18], [36, 1], [5, 32], [1] * 37):
        assert torch.equal(stepped(parts), stepped([37])), parts
