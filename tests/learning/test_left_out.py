"""What does not count, counts nowhere: rows left out, words of the logit -inf, spreads that are rounding alone."""

import math
from array import array
from dataclasses import replace

import pytest
import torch

from rlhf.config import AdamWConfig, SftConfig, TinyModelConfig
from rlhf.learning import losses, output_layer
from rlhf.learning.advantages import explained_variance, whiten
from rlhf.learning.kl_control import KlController
from rlhf.learning.microbatched import MicroBatched
from rlhf.learning.passes import PADDED, Packed
from rlhf.models.tokenizer import make_tokenizer
from rlhf.stages.sft import sft
from rlhf.types import Prompt, Rollouts
from tests.learning.test_learner import conversations, gradients, make_learner, sampled

__all__ = ["make_learner"]  # a fixture
HALF = [1.0 if b % 2 else 0.0 if b < 4 else None for b in range(12)]  # of the second and third prompt, two of four
IMPOSSIBLE = 11  # a word that no row has


def without(rollouts: Rollouts, word: int = IMPOSSIBLE) -> Rollouts:
    """The rows with another word in this one's place."""
    rows = [
        replace(c, ids=array("i", [3 if i == word else i for i in c.ids]), logprobs=c.logprobs)
        for c in rollouts.completions
    ]
    prompts = [Prompt("", tuple(3 if i == word else i for i in prompt.ids)) for prompt in rollouts.prompts]
    return replace(rollouts, prompts=prompts, completions=rows)


def never_says(policy: torch.nn.Module, logit: float, word: int = IMPOSSIBLE) -> None:
    """Give the word this logit, wherever it might stand."""
    bias = torch.zeros(policy.config.vocab_size)
    bias[word] = logit
    policy.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)


# --- rows ---------------------------------------------------------------------------------------------------------


def test_the_adaptive_coefficient_follows_the_kl_of_the_rows_that_count(make_learner):
    learner = make_learner("algo.kl_target=1", "algo.kl_horizon=100")
    batch = learner.score(sampled())
    kl_B = ((batch.sampled_BT - batch.ref_BT) * batch.mask_BT).sum(dim=1)
    kl = float(kl_B[[b for b, reward in enumerate(HALF) if reward is not None]].mean())
    learner.kl.target = kl / 1.1
    learner.learn(batch, HALF)
    assert learner.kl.coefficient == pytest.approx(0.2 * (1 + 0.1 * 8 / 100), rel=1e-5)


def test_rows_that_the_limit_has_cut_are_none_of_the_adaptive_coefficients_where_they_are_dropped(make_learner):
    rows = sampled()
    cut = [replace(c, finish_reason="length") if b % 3 else c for b, c in enumerate(rows.completions)]
    learner = make_learner("algo.kl_target=1", "algo.kl_horizon=100", "algo.truncated=drop")
    batch = learner.score(replace(rows, completions=cut))
    kl_B = ((batch.sampled_BT - batch.ref_BT) * batch.mask_BT).sum(dim=1)
    learner.kl.target = float(kl_B[::3].mean()) / 0.9
    learner.learn(batch, [float(b % 2) for b in range(12)])
    assert learner.kl.coefficient == pytest.approx(0.2 * (1 - 0.1 * 4 / 100), rel=1e-5)


def test_a_step_without_any_row_that_counts_moves_no_coefficient_and_tells_no_means(make_learner):
    learner = make_learner("algo.kl_target=1", "algo.kl_horizon=100")
    told = learner.learn(learner.score(sampled()), [None] * 12)
    assert learner.kl.coefficient == 0.2
    assert told.keys() == {"kl_coef", "lr", "loss", "grad_norm", "skipped_updates"} and told["loss"] == 0.0


def test_a_kl_that_is_no_number_moves_no_coefficient():
    controller = KlController(0.2, target=1.0, horizon=100)
    controller.observe(math.nan, rows=12)
    assert controller.coefficient == 0.2


def test_means_are_of_the_updates_that_have_rows(make_learner):
    rewards = [1.0, 0.0, 0.0, 1.0, *[None] * 8]
    one, three = make_learner("optim.lr=1e-9"), make_learner("optim.lr=1e-9", "updates_per_step=3")
    alone, together = (learner.learn(learner.score(sampled()), rewards) for learner in (one, three))
    for name in ("entropy", "kl", "mismatch", "ess", "clip_fraction"):
        assert together[name] == pytest.approx(alone[name], rel=1e-4), name
    assert together["entropy"] > 1.0


# --- words and tokens -------------------------------------------------------------------------------------------------


def of_plain(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return losses.token_logprobs(logits, ids, 0.7), losses.entropy(logits, 0.7)


def of_output_layer(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    impossible = torch.where(logits[0].isinf(), -math.inf, 0.0)
    layer, hidden = output_layer.OutputLayer(torch.eye(len(impossible)), impossible), logits.where(~logits.isinf(), 0.0)
    return output_layer.logprobs_and_entropy(hidden, layer, ids, 0.7, entropy_gradient=True, compiled=False)


@pytest.mark.parametrize("way", [of_plain, of_output_layer])
def test_entropy_with_impossible_words_is_that_of_the_others_and_so_is_its_gradient(way):
    torch.manual_seed(0)
    logits, ids = torch.randn(5, 7), torch.tensor([0, 1, 3, 4, 6])
    logits[:, [2, 5]] = -math.inf
    whole, others = logits.requires_grad_(), logits.detach()[:, [0, 1, 3, 4, 6]].requires_grad_()
    distribution = torch.distributions.Categorical(logits=others / 0.7)
    logprobs, entropy = way(whole, ids)
    assert torch.allclose(entropy, distribution.entropy(), atol=1e-5)
    (logprobs + entropy).sum().backward()
    (distribution.log_prob(torch.arange(5)) + distribution.entropy()).sum().backward()
    assert torch.allclose(whole.grad[:, [0, 1, 3, 4, 6]], others.grad, atol=1e-5)
    assert not whole.grad[:, [2, 5]].any()


@pytest.mark.parametrize("passes", [PADDED, Packed(False)], ids=["padded", "packed"])
@pytest.mark.parametrize("entropy_coef", [0, 0.1])
def test_a_step_with_an_impossible_word_is_that_of_one_with_a_hopeless_word(make_learner, passes, entropy_coef):
    learned, pulled = [], []
    for logit in (-math.inf, -1e4):
        for kept in (learned, pulled):
            learner = make_learner(f"algo.entropy_coef={entropy_coef}")
            learner.passes = passes
            for model in (learner.policy, learner.reference):
                never_says(model, logit)
            rewards, rows = [float(b % 2) for b in range(12)], without(sampled())
            kept.append(
                gradients(learner, rows, rewards) if kept is pulled else learner.learn(learner.score(rows), rewards)
            )
    assert learned[0] == pytest.approx(learned[1], rel=1e-6) and learned[0]["skipped_updates"] == 0.0
    assert torch.allclose(*pulled, atol=1e-7) and float(pulled[0].abs().max()) > 1e-3


def test_without_a_coefficient_entropy_is_no_part_of_the_loss_not_even_as_nan(make_learner):
    learner = make_learner("algo.entropy_coef=0")
    counted = learner.passes.logprobs_and_entropy
    rewards = [float(b % 2) for b in range(12)]

    class Broken:
        """As PADDED, with entropies of NaN."""

        single, logprobs, values, split = PADDED.single, PADDED.logprobs, PADDED.values, PADDED.split

        def logprobs_and_entropy(self, *arguments, **options):
            logprobs_BT, entropy_BT = counted(*arguments, **options)
            return logprobs_BT, entropy_BT * math.nan

    learner.passes = Broken()
    told = learner.learn(learner.score(sampled()), rewards)
    assert math.isnan(told["entropy"]) and math.isfinite(told["loss"]) and told["skipped_updates"] == 0.0


@pytest.mark.parametrize(
    ("algo", "passes"),
    [("grpo", PADDED), ("grpo", Packed(False)), ("gspo", PADDED), ("cispo", PADDED)],
    ids=["grpo-padded", "grpo-packed", "gspo-padded", "cispo-padded"],
)
def test_what_the_environment_says_may_be_impossible_for_the_policy(make_learner, algo, passes):
    rows = without(conversations())
    said = [
        replace(c, ids=array("i", [i if ours else IMPOSSIBLE for i, ours in zip(c.ids, c.mask, strict=True)]))
        for c in rows.completions
    ]
    pulled = []
    for logit in (-math.inf, -1e4):
        learner = make_learner(f"algo={algo}", "algo.entropy_coef=0.1", "updates_per_step=1", "algo.kl_coef=0.1")
        learner.passes = passes
        for model in (learner.policy, learner.reference):
            never_says(model, logit)
        pulled.append(gradients(learner, replace(rows, completions=said), [float(b % 3) for b in range(12)]))
    assert torch.allclose(*pulled, atol=1e-7) and float(pulled[0].abs().max()) > 1e-3


def test_the_warm_up_does_not_mind_a_prompt_that_is_impossible_for_the_policy(make_learner):
    found, tokenizer = [], make_tokenizer(TinyModelConfig(), "abcdefghi", chat=False)
    by = MicroBatched(AdamWConfig(), tokens=100)
    for logit in (-math.inf, -1e4):
        policy = make_learner().policy
        never_says(policy, logit)
        asked = Prompt("ai", (3, IMPOSSIBLE, 4))
        config = SftConfig(steps=2, batch_size=1, lr=0.01)
        found.append([step["loss"] for step in sft(policy, tokenizer, [(asked, "bc")], config, by, 0)])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


# --- spreads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.7, 0.1, -3.3, 12.3, 1 / 3, 0.0])
@pytest.mark.parametrize("rows", [1, 5, 100, 1000])
def test_equal_returns_are_exactly_zero_when_whitened_and_nothing_that_a_critic_could_explain(value, rows):
    torch.manual_seed(0)
    mask = (torch.rand(rows, 7) > 0.3).float()
    returns = torch.where(mask > 0, value, 99.0)
    assert whiten(returns, mask).tolist() == [[0.0] * 7] * rows
    assert explained_variance(torch.rand(rows, 7), returns, mask) == 0.0


def test_a_step_of_equal_rewards_teaches_reinforce_pp_nothing(make_learner):
    learner = make_learner("algo=reinforce_pp", "algo.kl_coef=0")
    assert gradients(learner, sampled(), [0.7] * 12).abs().max() == 0
