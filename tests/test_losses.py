"""Golden numbers and properties of losses and of their aggregation."""

import pytest
import torch

from rlhf import losses

OLD = torch.tensor([[-1.2, -1.2, -1.2, -1.2]])
NEW = torch.tensor([[-0.8, -0.8, -1.8, -0.0001]])
ADVANTAGES = torch.tensor([[1.0, -1.0, 1.0, -1.0]])


def test_the_clipped_surrogate_matches_the_golden_numbers():
    loss = losses.clipped_surrogate(losses.log_ratio(NEW, OLD), ADVANTAGES, 0.2, 0.28)
    assert torch.allclose(loss, torch.tensor([[-1.28, 1.491825, -0.548812, 3.319785]]), atol=1e-5)


def test_kl_estimators_match_the_golden_numbers():
    logprobs, reference = torch.tensor([-1.0, -0.5, -2.0]), torch.tensor([-1.5, -0.4, -1.0])
    assert torch.allclose(losses.kl_k1(logprobs, reference), torch.tensor([0.5, -0.1, -1.0]))
    assert torch.allclose(losses.kl_k2(logprobs, reference), torch.tensor([0.125, 0.005, 0.5]))
    expected = torch.tensor([0.106531, 0.005171, 0.718282])
    assert torch.allclose(losses.kl_k3(logprobs, reference), expected, atol=1e-5)
    assert torch.allclose(losses.kl_in_loss(logprobs, reference), expected, atol=1e-5)


def test_the_kl_gradient_in_the_loss_is_that_of_the_true_kl():
    torch.manual_seed(0)
    logits, reference = torch.randn(5, requires_grad=True), torch.randn(5).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (true,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)
    tokens = torch.multinomial(logits.detach().softmax(0), 200_000, replacement=True)
    sampled = logits.log_softmax(0)[tokens]
    (estimate,) = torch.autograd.grad(losses.kl_in_loss(sampled, reference[tokens]).mean(), logits)
    assert torch.allclose(estimate, true, atol=0.02)
    assert true.abs().max() > 0.1


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("token_mean", 1.2), ("seq_mean_token_mean", 1.5), ("seq_mean_token_sum_norm", 0.75)],
)
def test_aggregations_match_the_golden_numbers(aggregation, expected):
    loss = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
    weights = losses.row_weights(aggregation, torch.tensor([4, 1]), max_tokens=4)
    assert float((weights * loss.sum(1)).sum()) == pytest.approx(expected)


def test_aggregations_count_only_rows_that_have_tokens():
    weights = losses.row_weights("seq_mean_token_mean", torch.tensor([2, 0]), max_tokens=4)
    assert float(weights[0]) == pytest.approx(0.5)


def test_token_logprobs_are_those_of_the_tempered_softmax_and_leave_the_logits_alone():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3))
    first = losses.token_logprobs(logits, ids, 0.6)
    expected = torch.log_softmax(logits / 0.6, -1).gather(-1, ids[..., None]).squeeze(-1)
    assert torch.allclose(first, expected, atol=1e-6)
    assert torch.equal(losses.token_logprobs(logits, ids, 0.6), first)


def test_entropy_is_that_of_the_tempered_softmax():
    logits = torch.randn(4, 9)
    distribution = torch.distributions.Categorical(logits=logits / 0.7)
    assert torch.allclose(losses.entropy(logits, 0.7), distribution.entropy(), atol=1e-5)


def test_the_value_loss_takes_the_worse_of_clipped_and_unclipped():
    values, old, returns = torch.tensor([[1.0, 0.1]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert torch.allclose(losses.value_loss(values, old, returns, 0.2), torch.tensor([[0.32, 0.405]]))
    assert torch.allclose(losses.value_loss(values, old, returns, None), torch.tensor([[0.0, 0.405]]))


def test_bradley_terry_matches_the_golden_numbers():
    loss = losses.bradley_terry(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert torch.allclose(loss, torch.tensor([0.313262, 2.126928]), atol=1e-5)
    assert float(loss.mean()) == pytest.approx(1.220095, abs=1e-5)
