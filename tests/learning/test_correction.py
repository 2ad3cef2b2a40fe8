"""Importance weights between worker and trainer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.algo import AlgoConfig, Correction
from rlhf.learning import correction
from rlhf.learning.objective import correction_weights

TRAINER = torch.tensor([[-1.0, -1.0, -3.0]])
WORKER = torch.tensor([[-1.2, -0.9, -1.0]])
W = torch.tensor([[1.221403, 0.904837, 0.135335]])
ALL = torch.ones(1, 3)


def test_weights_match_the_golden_numbers():
    assert torch.allclose(correction.truncated(TRAINER, WORKER, 2.0), W, atol=1e-6)
    assert torch.allclose(correction.truncated(TRAINER, WORKER, 1.0), W.clamp(max=1.0), atol=1e-6)
    assert torch.allclose(correction.icepop(TRAINER, WORKER, 0.5, 2.0), W * torch.tensor([1, 1, 0]), atol=1e-6)
    assert float(correction.geometric_mean(TRAINER, WORKER, ALL).exp()) == pytest.approx(0.530819, abs=1e-6)
    total = float((TRAINER - WORKER).sum().exp())
    assert total == pytest.approx(0.149570, abs=2e-6), "the row by its sum, which no decision is taken by"


@given(st.integers(1, 200), st.floats(-0.5, 0.5), st.integers(1, 4))
def test_making_a_row_longer_with_an_equal_gap_a_token_leaves_the_decision_unchanged(length, gap, times):
    def decided(tokens):
        old = torch.full((1, tokens), -1.0, dtype=torch.float64)
        return float(correction.sequence_mask(old + gap, old, torch.ones(1, tokens), 0.8, 1.25))

    if abs(gap - torch.tensor(1.25).log().item()) > 1e-3 and abs(gap - torch.tensor(0.8).log().item()) > 1e-3:
        assert decided(length) == decided(length * times)


def test_padding_changes_no_weight():
    padded = [torch.cat([each, torch.full((1, 2), 9.0 * sign)], 1) for each, sign in ((TRAINER, 1), (WORKER, -1))]
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])
    for kind in Correction:
        algo = AlgoConfig(name="x", advantage="group_norm", correction=kind)
        alone, together = correction_weights(algo, TRAINER, WORKER, ALL), correction_weights(algo, *padded, mask)
        assert torch.allclose(alone, together[:, : alone.shape[1]], atol=1e-6)


def test_where_both_agree_every_correction_is_one_and_all_samples_count():
    for kind in Correction:
        algo = AlgoConfig(name="x", advantage="group_norm", correction=kind)
        assert torch.equal(correction_weights(algo, TRAINER, TRAINER, ALL).expand(1, 3), ALL)
    assert correction.effective_share(1.0, 1.0) == 1.0


def test_the_effective_share_is_that_of_the_weights():
    w = torch.tensor([4.0, 0.0, 0.0, 0.0])
    assert correction.effective_share(float(w.mean()), float(w.square().mean())) == pytest.approx(0.25)


def test_no_gradient_flows_through_a_weight():
    logprobs = TRAINER.clone().requires_grad_()
    weights = [
        correction.truncated(logprobs, WORKER, 2.0),
        correction.icepop(logprobs, WORKER, 0.5, 2.0),
        correction.sequence_mask(logprobs, WORKER, ALL, 0.5, 2.0),
    ]
    assert not any(weight.requires_grad for weight in weights)
