"""Golden numbers and properties of losses and of their aggregation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.learning import losses

OLD = torch.tensor([[-1.2, -1.2, -1.2, -1.2]])
NEW = torch.tensor([[-0.8, -0.8, -1.8, -0.0001]])
ADVANTAGES = torch.tensor([[1.0, -1.0, 1.0, -1.0]])


def test_the_clipped_surrogate_matches_the_golden_numbers():
    ratio = losses.log_ratio(NEW, OLD).exp()
    assert torch.allclose(ratio, torch.tensor([[1.491825, 1.491825, 0.548812, 3.319785]]), atol=1e-5)
    loss = losses.clipped_surrogate(losses.log_ratio(NEW, OLD), ADVANTAGES, 0.2, 0.28)
    assert torch.allclose(loss, torch.tensor([[-1.28, 1.491825, -0.548812, 3.319785]]), atol=1e-5)


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    loss = losses.clipped_surrogate(losses.log_ratio(NEW, OLD), ADVANTAGES, 0.2, 0.28, dual=3.0)
    assert torch.allclose(loss, torch.tensor([[-1.28, 1.491825, -0.548812, 3.0]]), atol=1e-5)


def test_cispo_matches_the_golden_numbers_and_clipped_tokens_keep_a_gradient():
    new = NEW.clone().requires_grad_()
    loss = losses.cispo(losses.log_ratio(new, OLD), new, ADVANTAGES, 0.2, 0.28)
    assert torch.allclose(loss, torch.tensor([[1.024, -1.024, 1.44, -0.000128]]), atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    assert torch.allclose(gradient, torch.tensor([[-1.28, 1.28, -0.8, 1.28]]), atol=1e-6)
    assert (
        torch.autograd.grad(losses.clipped_surrogate(losses.log_ratio(new, OLD), ADVANTAGES, 0.2, 0.28).sum(), new)[
            0
        ].tolist()[0][0]
        == 0.0
    ), "where PPO's clip has none"


def test_sapo_matches_the_golden_numbers_and_begins_with_the_gradient_of_an_unclipped_ratio():
    loss = losses.sapo(losses.log_ratio(NEW, OLD), ADVANTAGES, 1.0, 1.05)
    assert torch.allclose(loss, torch.tensor([[-2.482145, 2.385941, -1.556313, 3.502914]]), atol=1e-5)
    new = OLD.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.sapo(losses.log_ratio(new, OLD), ADVANTAGES, 1.0, 1.05).sum(), new)
    assert torch.allclose(gradient, -ADVANTAGES, atol=1e-6)


def test_sapos_gradient_fades_where_the_ratio_leaves_1_faster_for_bad_tokens():
    delta = torch.tensor([[0.0, 1.0, 2.0]]).log1p().requires_grad_()
    ratio = delta.exp()

    def of_ratio(advantage):
        (gradient,) = torch.autograd.grad(losses.sapo(delta, torch.full((1, 3), advantage), 1.0, 2.0).sum(), delta)
        return (gradient / ratio).abs()[0].tolist()

    good, bad = of_ratio(1.0), of_ratio(-1.0)
    assert good[0] == pytest.approx(1.0) and good[0] > good[1] > good[2] > 0
    assert all(fast < slow for fast, slow in zip(bad[1:], good[1:], strict=True))


def test_the_ratio_of_a_row_is_the_geometric_mean_and_matches_the_golden_numbers():
    new, mask = torch.tensor([[0.3, 0.1, -0.2], [0.5, 0.0, 7.0]]), torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    ratio = losses.sequence_log_ratio(new, torch.zeros(2, 3), mask).exp()
    assert torch.allclose(ratio, torch.tensor([[1.068939] * 3, [1.284025] * 3]), atol=1e-6)


def test_gspos_gradient_is_that_of_the_papers_row_form():
    new, mask = torch.tensor([[0.3, 0.1, -0.2]], requires_grad=True), torch.ones(1, 3)
    token = losses.clipped_surrogate(losses.sequence_log_ratio(new, torch.zeros(1, 3), mask), torch.ones(1, 3), 1, 1)
    (ours,) = torch.autograd.grad(token.mean(), new)
    (paper,) = torch.autograd.grad(-new.mean().exp(), new)
    assert torch.allclose(ours, paper, atol=1e-6)


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


def test_plain_gradients_through_k1_and_k3_are_not_that_of_the_true_kl():
    """Why `kl_in_loss` does not use them: zero on average, and biased."""
    torch.manual_seed(0)
    logits, reference = torch.randn(5, requires_grad=True), torch.randn(5).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (true,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)
    tokens = torch.multinomial(logits.detach().softmax(0), 200_000, replacement=True)
    for estimator, wrong in ((losses.kl_k1, torch.zeros(5)), (losses.kl_k3, None)):
        (plain,) = torch.autograd.grad(estimator(logits.log_softmax(0)[tokens], reference[tokens]).mean(), logits)
        assert (plain - true).abs().max() > 0.1
        assert wrong is None or torch.allclose(plain, wrong, atol=0.02)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_in_the_loss_every_estimator_has_its_value_and_the_gradient_of_the_true_kl(estimator):
    torch.manual_seed(0)
    logits, reference = torch.randn(5, requires_grad=True), torch.randn(5).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (true,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)
    tokens = torch.multinomial(logits.detach().softmax(0), 200_000, replacement=True)
    kl = losses.kl_in_loss(logits.log_softmax(0)[tokens], reference[tokens], estimator)
    (estimate,) = torch.autograd.grad(kl.mean(), logits)
    assert torch.allclose(estimate, true, atol=0.02)
    assert torch.equal(kl, losses.KL[estimator](logits.log_softmax(0)[tokens], reference[tokens]))


def test_the_prompt_mean_weighs_prompts_alike_whatever_their_tokens():
    weights = losses.row_weights("prompt_mean", torch.tensor([4, 1, 3, 0]), 4, torch.tensor([0, 0, 1, 2]))
    loss = torch.tensor([4.0, 2.0, 9.0, 0.0])  # summed over each row's tokens
    assert float((weights * loss).sum()) == pytest.approx(((4 + 2) / 5 + 9 / 3) / 2)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", 1.2),  # not 1.5, the mean of the rows' token means
        ("seq_mean_token_mean", 1.5),
        ("seq_mean_token_sum_norm", 0.75),
        ("seq_mean_token_sum_norm, undivided", 3.0),
        ("prompt_mean", 1.2),
    ],
)
def test_aggregations_match_the_golden_numbers(aggregation, expected):
    loss = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
    name, _, undivided = aggregation.partition(", ")
    weights = losses.row_weights(name, torch.tensor([4, 1]), 1 if undivided else 4, torch.tensor([0, 0]))
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


def plainly(logits: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Log-probs and entropies at temperature 0.6, by autograd and with copies of the whole vocabulary."""
    logprobs = torch.log_softmax(logits.float() / 0.6, -1)
    return {
        "token_logprobs": logprobs.gather(-1, ids[..., None]).squeeze(-1),
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
    }


def ours(name: str, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The same number by the function of that name."""
    return losses.token_logprobs(logits, ids, 0.6) if name == "token_logprobs" else losses.entropy(logits, 0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["token_logprobs", "entropy"])
def test_gradients_of_log_probs_and_entropy_are_autograds_however_few_rows_are_taken_at_a_time(
    name, dtype, monkeypatch
):
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 4, 7).to(dtype).requires_grad_(), torch.randint(0, 7, (3, 4))
    weights = torch.randn(3, 4)
    plain = plainly(logits, ids)[name]
    (expected,) = torch.autograd.grad((plain * weights).sum(), logits)
    for part in (1, 20, 2**22):
        monkeypatch.setattr(losses, "PART", part)
        values = ours(name, logits, ids)
        (gradient,) = torch.autograd.grad((values * weights).sum(), logits)
        assert torch.allclose(values, plain, atol=1e-6) and gradient.dtype == dtype
        assert torch.allclose(gradient.float(), expected.float(), atol=1e-6 if dtype is torch.float32 else 1e-2)


class Large(TorchDispatchMode):
    """Counts the operations that make a tensor of `numbers` or more in memory of its own."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.made = numbers, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        taken = {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.numel() >= self.numbers and out.data_ptr() not in taken:
            self.made.append(str(func))
        return out


@pytest.mark.parametrize("name", ["token_logprobs", "entropy"])
def test_neither_log_probs_nor_entropy_copy_the_vocabulary_and_their_gradient_is_the_one_tensor_of_its_size(
    name, monkeypatch
):
    monkeypatch.setattr(losses, "PART", 3 * 50)
    logits, ids = torch.randn(3, 40, 50).requires_grad_(), torch.randint(0, 50, (3, 40))
    with Large(logits.numel()) as plain:
        plainly(logits, ids)
    with Large(logits.numel()) as forward:
        values = ours(name, logits, ids)
    with Large(logits.numel()) as backward:
        values.sum().backward()
    assert len(plain.made) > 1 and forward.made == [] and backward.made == ["aten.empty_like.default"]


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


def test_a_margin_asks_for_more_distance_and_centring_for_scores_around_zero():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert torch.allclose(losses.bradley_terry(chosen, rejected, 1.0), losses.bradley_terry(chosen - 1, rejected))
    centred = losses.bradley_terry(chosen, rejected, centring=0.01) - losses.bradley_terry(chosen, rejected)
    assert torch.allclose(centred, torch.tensor([0.01, 0.04]), atol=1e-6)


def test_dpo_is_bradley_terry_on_beta_times_the_log_ratios():
    chosen, rejected = torch.tensor([0.3, -1.0]), torch.tensor([-0.2, 0.5])
    assert torch.allclose(losses.dpo(chosen, rejected, 0.1), losses.bradley_terry(0.1 * chosen, 0.1 * rejected))
    assert float(losses.dpo(torch.zeros(1), torch.zeros(1), 0.1)) == pytest.approx(0.693147, abs=1e-6)
