"""Rows with prompts of their own, and samples that are several rows because their context was rewritten."""

from dataclasses import replace

import pytest
import torch

from rlhf.learning.forward import collate
from rlhf.shell.ending import RunError
from tests.learning.test_learner import conversations, gradients, make_learner, sampled  # noqa: F401

REWARDS = [float(b % 3) for b in range(12)]
ALGO = ("algo=rloo", "algo.kl_coef=0")


def test_rows_with_a_prompt_of_their_own_teach_what_a_group_with_that_prompt_does(make_learner):  # noqa: F811
    rollouts = conversations()
    own = [(5, 3, 4), (7,), (6, 6, 2, 3)]
    others = replace(rollouts, prompts=[replace(p, ids=ids) for p, ids in zip(rollouts.prompts, own, strict=True)])
    of_rows = [replace(c, prompt=own[b // 4]) for b, c in enumerate(rollouts.completions)]
    expected = gradients(make_learner(*ALGO), others, list(REWARDS))
    ours = gradients(make_learner(*ALGO), replace(rollouts, completions=of_rows), list(REWARDS))
    assert torch.allclose(ours, expected, atol=1e-6) and expected.abs().max() > 1e-3
    assert not torch.allclose(ours, gradients(make_learner(*ALGO), rollouts, list(REWARDS)), atol=1e-4)


def with_earlier(rollouts, sample=5):
    """The same, of which one sample has had two contexts before."""
    earlier = tuple(replace(rollouts.completions[b], prompt=(4, 4, b + 2)) for b in (0, 3))
    rows = [replace(c, earlier=earlier) if b == sample else c for b, c in enumerate(rollouts.completions)]
    return replace(rollouts, completions=rows)


@pytest.mark.parametrize("dials", [ALGO, ("algo=grpo",), ("algo=dapo", "algo.overlong_buffer=0"), ("algo=gspo",)])
def test_what_was_said_in_an_earlier_context_has_the_advantage_of_its_sample(make_learner, dials):  # noqa: F811
    learner, rollouts = make_learner(*dials), with_earlier(sampled())
    batch = learner.score(rollouts)
    assert batch.ids_BT.shape[0] == 14 and batch.groups[12:] == [1, 1] and batch.prompt_of_B[12:] == [3, 4]
    learner.learn(batch, REWARDS)
    given = batch.advantages_BT[:, 0]
    assert given[12] == given[13] == given[5] != 0
    alone = make_learner(*dials)
    plain = alone.score(sampled())
    alone.learn(plain, REWARDS)
    width = plain.advantages_BT.shape[1]
    assert torch.equal(plain.advantages_BT, batch.advantages_BT[:12, :width]), "groups are compared as ever"


def test_a_sample_without_a_reward_leaves_its_earlier_rows_out_too(make_learner):  # noqa: F811
    learner, rewards = make_learner(*ALGO), [None if b == 5 else reward for b, reward in enumerate(REWARDS)]
    batch = learner.score(with_earlier(sampled()))
    learner.learn(batch, rewards)
    assert batch.mask_BT[[5, 12, 13]].sum() == 0 < batch.mask_BT[4].sum()


def test_gradients_with_earlier_rows_are_the_same_for_any_split(make_learner):  # noqa: F811
    learner = make_learner(*ALGO)
    whole = gradients(learner, with_earlier(sampled()), list(REWARDS))
    learner.config.tokens_per_microbatch = 30
    split = gradients(learner, with_earlier(sampled()), list(REWARDS))
    assert (split - whole).abs().max() < 2e-6 * whole.abs().max()


@pytest.mark.parametrize("algo", ["ppo", "reinforce_pp"])
def test_rewards_that_follow_tokens_cannot_be_had_of_several_rows(make_learner, algo):  # noqa: F811
    learner = make_learner(f"algo={algo}")
    with pytest.raises(RunError, match="choose an algo that compares whole samples"):
        learner.learn(learner.score(with_earlier(sampled())), list(REWARDS))
    learner.learn(learner.score(sampled()), list(REWARDS))


def test_tokens_and_versions_are_those_of_all_rows():
    plain, rollouts = sampled(), with_earlier(sampled())
    more = len(plain.completions[0].ids) + len(plain.completions[3].ids)
    assert rollouts.tokens == plain.tokens + more and len(rollouts.lags(9)) == rollouts.tokens
    assert collate(rollouts, torch.device("cpu")).mask_BT.sum() == rollouts.tokens
