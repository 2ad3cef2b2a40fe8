"""Golden numbers and properties of rewards -> advantages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.learning.advantages import (
    explained_variance,
    gae,
    group_mean,
    group_norm,
    leave_one_out,
    overlong,
    reward_to_go,
    token_rewards,
    whiten,
)

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0])


@pytest.mark.parametrize(("estimator", "size"), [(group_norm, 0.866024), (group_mean, 0.5), (leave_one_out, 0.666667)])
def test_group_advantages_match_the_golden_numbers_and_are_zero_without_signal(estimator, size):
    advantages = estimator(REWARDS)
    assert torch.allclose(advantages[0], size * SIGNS, atol=1e-5)
    assert advantages[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("estimator", [group_norm, group_mean, leave_one_out])
@pytest.mark.parametrize("reward", [0.7, 3.3, 12.3, -123.4])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero_whatever_they_are(estimator, reward):
    assert estimator(torch.full((2, 8), reward)).tolist() == [[0.0] * 8] * 2


@pytest.mark.parametrize("estimator", [group_norm, group_mean, leave_one_out])
def test_a_sample_without_a_reward_leaves_its_group_as_if_it_were_not_there(estimator):
    with_hole = torch.tensor([[1.0, 0.0, float("nan"), 1.0]])
    assert torch.allclose(estimator(with_hole)[0, [0, 1, 3]], estimator(torch.tensor([[1.0, 0.0, 1.0]]))[0])


@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    [
        (1.0, 1.0, [0.5, 0.6, 0.0, 0.8, 0.0, 0.0]),
        (1.0, 0.95, [0.432, 0.56, 0.0, 0.8, 0.0, 0.0]),
        (0.99, 0.95, [0.41365, 0.5504, 0.0, 0.8, 0.0, 0.0]),
    ],
)
def test_gae_skips_tokens_the_policy_did_not_sample(gamma, lam, expected):
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 0.4, 9.0, 0.2, 7.0, 3.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0, 0.0]])
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    assert torch.allclose(advantages, torch.tensor([expected]), atol=1e-5)
    assert torch.allclose(returns, (advantages + values) * mask)


@given(st.integers(0, 4), st.floats(0.5, 1.0), st.floats(0.0, 1.0))
def test_masked_tokens_inserted_anywhere_leave_the_advantages_of_real_tokens_unchanged(place, gamma, lam):
    torch.manual_seed(0)
    rewards, values, mask = torch.rand(2, 4), torch.rand(2, 4), torch.ones(2, 4)
    plain, _ = gae(rewards, values, mask, gamma, lam)
    to_go = reward_to_go(rewards, mask, gamma)

    def insert(x, value):
        return torch.cat([x[:, :place], torch.full((2, 1), value), x[:, place:]], dim=1)

    inserted, _ = gae(insert(rewards, 5.0), insert(values, 7.0), insert(mask, 0.0), gamma, lam)
    keep = [t for t in range(5) if t != place]
    assert torch.allclose(inserted[:, keep], plain, atol=1e-6)
    assert torch.allclose(reward_to_go(insert(rewards, 5.0), insert(mask, 0.0), gamma)[:, keep], to_go, atol=1e-6)


def test_the_reward_of_every_row_is_on_its_last_sampled_token():
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]])
    rewards = torch.tensor([2.0, -1.0, 3.0])
    rho = token_rewards(rewards, torch.zeros(3, 4), mask)
    assert rho.tolist() == [[0, 2, 0, 0], [0, 0, 0, -1], [0, 0, 3, 0]]
    penalised = token_rewards(rewards, torch.full((3, 4), 0.5), mask)
    assert torch.allclose(penalised.sum(1), rewards - 0.5 * mask.sum(1))


def test_the_overlong_penalty_matches_the_golden_numbers():
    assert overlong(torch.tensor([80.0, 90.0, 100.0, 3.0]), 100, 20).tolist() == [0.0, -0.5, -1.0, 0.0]


def test_a_row_without_any_token_gets_no_reward_anywhere():
    assert token_rewards(torch.tensor([4.0]), torch.zeros(1, 3), torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


def test_whitening_has_masked_mean_zero_and_variance_one_whatever_the_padding():
    torch.manual_seed(0)
    values, mask = torch.randn(3, 5) * 4 + 2, (torch.rand(3, 5) > 0.3).float()
    white = whiten(values, mask)
    picked = white[mask > 0]
    assert abs(float(picked.mean())) < 1e-6 and abs(float(picked.var()) - 1) < 1e-5
    padded = whiten(torch.cat([values, torch.full((3, 2), 99.0)], 1), torch.cat([mask, torch.zeros(3, 2)], 1))
    assert torch.allclose(padded[:, :5], white, atol=1e-6) and padded[:, 5:].abs().sum() == 0


def test_whitening_a_single_token_does_not_divide_by_zero():
    assert torch.isfinite(whiten(torch.tensor([[3.0]]), torch.tensor([[1.0]]))).all()


def test_the_explained_variance_is_one_for_a_perfect_critic_zero_for_a_constant_and_blind_to_padding():
    returns, mask = torch.tensor([[1.0, 3.0, 99.0], [5.0, 7.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full_like(returns, 4.0), returns, mask) == pytest.approx(0.0)
    half = returns + torch.tensor([[2.0, -2.0, 50.0], [0.0, 0.0, 0.0]])
    assert explained_variance(half, returns, mask) == pytest.approx(1 - 1.6 / 8.0)
    assert explained_variance(-returns, returns, mask) < 0
    assert explained_variance(returns, torch.ones(2, 3), mask) == 0.0
