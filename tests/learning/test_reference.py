"""The reference policy over a run."""

import copy

import pytest
import torch

from rlhf.checkpoint.shards import write_tensors
from rlhf.config.algo import AlgoConfig
from rlhf.learning.reference import refresh


def pair():
    torch.manual_seed(0)
    policy = torch.nn.BatchNorm1d(3)  # parameters, a floating-point buffer and an integer one
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        policy.weight.add_(1.0), policy.running_mean.add_(2.0), policy.num_batches_tracked.add_(5)
    return policy, reference


def algo(**dials):
    return AlgoConfig(name="x", advantage="group_norm", **dials)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_by_default_the_reference_stays_bit_for_bit():
    policy, reference = pair()
    before = state(reference)
    refresh(reference, policy, algo(), step=10, averages={})
    assert all(torch.equal(before[name], tensor) for name, tensor in reference.state_dict().items())


def test_every_so_many_steps_the_policy_becomes_its_own_reference():
    policy, reference = pair()
    refresh(reference, policy, algo(ref_every=4), step=6, averages={})
    assert not torch.equal(reference.weight, policy.weight)
    refresh(reference, policy, algo(ref_every=4), step=8, averages={})
    assert all(torch.equal(state(policy)[name], tensor) for name, tensor in reference.state_dict().items())
    assert reference.weight.data_ptr() != policy.weight.data_ptr()


def test_a_moving_average_keeps_its_share_of_the_reference():
    policy, reference = pair()
    refresh(reference, policy, algo(ref_decay=0.9), step=1, averages={})
    assert torch.allclose(reference.weight, torch.full((3,), 1.1))
    assert float(reference.running_mean[0]) == pytest.approx(0.2)
    assert reference.num_batches_tracked == 5, "what cannot be averaged is copied"


def test_a_moving_average_in_bfloat16_gets_to_where_one_in_fp32_gets():
    policy, reference = (model.bfloat16() for model in pair())
    averages: dict[str, torch.Tensor] = {}
    for step in range(1, 2001):
        refresh(reference, policy, algo(ref_decay=0.999), step, averages)
    assert float(reference.weight.detach()[0]) == pytest.approx(2 - 0.999**2000, abs=0.01), (
        "rounded at each step it stays at 1"
    )
    assert torch.equal(reference.weight, averages["weight"].bfloat16())


def test_weights_that_are_tied_move_once_a_step_and_their_average_is_saved_once(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.output = torch.nn.Embedding(2, 2), torch.nn.Linear(2, 2, bias=False)
            self.output.weight = self.embedding.weight

    policy, reference = Tied(), Tied()
    torch.nn.init.ones_(policy.output.weight), torch.nn.init.zeros_(reference.output.weight)
    averages: dict[str, torch.Tensor] = {}
    refresh(reference, policy, algo(ref_decay=0.75), step=1, averages=averages)
    assert torch.equal(reference.embedding.weight, torch.full((2, 2), 0.25))
    write_tensors(tmp_path / "averages.safetensors", averages)  # which refuses two tensors of one memory
