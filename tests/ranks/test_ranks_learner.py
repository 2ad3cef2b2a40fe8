"""A learner of several ranks has the gradients, metrics and weights of one process, to the bit.

With one micro-batch a rank, or none, those of one process with all of them; with more, those of one that adds up each
rank's share by itself, and then the shares in the order of the ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from composed import composed_run
from forked_ranks import pool
from test_dpo import LETTERS, made
from test_learner import sampled
from torch import Tensor

from rlhf.learning.learner import Learner
from rlhf.learning.pass_choice import random_batch
from rlhf.learning.passes import PADDED, Packed, Passes
from rlhf.learning.spread import Sharded, Whole
from rlhf.models.adapter import add_adapter, has_adapter
from rlhf.models.policy import make_policy
from rlhf.models.tokenizer import make_tokenizer
from rlhf.models.value import Head, value_model
from rlhf.preflight.memory_estimate import Count, Sizes, trainer
from rlhf.ranks.ranks import ALONE, Ranks
from rlhf.stages.dpo import DpoLearner
from rlhf.types import Rollouts
from transfer.agreement.dtensor import is_dtensor, local_part

MICRO = ("model.layers=1", "model.hidden=16", "model.heads=2", "model.intermediate=24", "optim.lr=0.01")
ALGOS = [
    "algo=grpo",
    "algo=ppo algo.critic_warmup_steps=0",
    "algo=gspo",
    "algo=grpo updates_per_step=2",
    "algo=grpo model.lora.rank=2",
    "algo=grpo model.gradient_checkpointing=true",
    "algo=grpo model.dtype=bfloat16",
    "algo=grpo model.dtype=bfloat16 optim.master_weights=false",
    "algo=dapo algo.ref_decay=0.5 algo.kl_coef=0.1",
]
FAST = {ALGOS[0], ALGOS[1], ALGOS[4], ALGOS[6]}  # the others are variants of these
REWARDS: list[float | None] = [float(b % 3) if b != 2 else None for b in range(12)]


def slow(values: tuple[Any, ...]) -> Any:
    """Values of parameters, for CI."""
    return pytest.param(*values, marks=pytest.mark.slow)


def marked(algos: Sequence[str]) -> list[Any]:
    """Values of a parameter, of which those that are not in FAST are slow."""
    return [each if each in FAST else slow((each,)) for each in algos]


def learner_of(words: str, ranks: Ranks = ALONE, sharded: bool | Sharded = False, passes: Passes = PADDED) -> Learner:
    """The same in every process."""
    config = composed_run(*MICRO, *words.split())
    policy, reference = (
        make_policy(config.model, make_tokenizer(config.model, "abcdefghi", chat=False), seed=seed) for seed in (1, 2)
    )
    if config.model.lora.rank:
        add_adapter(policy, config.model.lora.rank, config.model.lora.alpha, config.model.lora.target)
        for name, tensor in policy.named_parameters():
            if "lora_B" in name:  # zeros, at first: nothing would reach the other matrix
                torch.nn.init.normal_(tensor, std=0.2, generator=torch.Generator().manual_seed(3))
    critic = value_model(policy, Head.token) if config.rl.has_critic else None
    if critic is not None:
        drawn = torch.normal(0.0, 0.5, critic.score.weight.shape, generator=torch.Generator().manual_seed(4))
        critic.score.weight.data.copy_(drawn)
    spread = Sharded(ranks, torch.device("cpu")) if sharded is True else sharded or Whole(ranks)
    reference = policy if has_adapter(policy) else reference.requires_grad_(False)
    for model in {id(each): each for each in (policy, reference, critic) if each is not None}.values():
        spread.lay(model)
    return Learner(policy, reference, critic, config, passes, spread)


def split_into(learner: Learner, parts: int) -> None:
    """Let the learner make so many micro-batches of any rows."""

    def split(batch: object, rows: Sequence[int]) -> list[list[int]]:
        cuts = [len(rows) * n // parts for n in range(parts + 1)]
        return [list(rows[start:end]) for start, end in pairwise(cuts)]

    learner._microbatches = split  # type: ignore[method-assign, assignment]


def steps(learner: Learner, parts: int, rollouts: Sequence[Rollouts]) -> list[Any]:
    """Metrics of each step, and the weights after it."""
    split_into(learner, parts)
    told = []
    for each in rollouts:
        metrics = learner.learn(learner.score(each), REWARDS)
        models = [learner.policy, *([learner.critic] if learner.critic is not None else [])]
        told.append([metrics, [whole(p.detach()).clone() for model in models for p in model.parameters()]])
    return told


def whole(tensor: Any) -> Tensor:
    """The tensor, in the dtype that it computes in."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def _steps(ranks: Ranks, words: str, parts: int, rollouts: Sequence[Rollouts], sharded: bool = False) -> list[Any]:
    return steps(learner_of(words, ranks, sharded), parts, rollouts)


def _packed_steps(ranks: Ranks, words: str, parts: int, rollouts: Sequence[Rollouts]) -> list[Any]:
    return steps(learner_of(words, ranks, sharded=True, passes=Packed(compiled=False)), parts, rollouts)


def assert_the_same(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for (metrics, weights), (expected, of_one) in zip(ours, theirs, strict=True):
        assert metrics == expected
        assert all(map(torch.equal, weights, of_one)) and len(weights) == len(of_one)


@pytest.mark.parametrize("words", marked(ALGOS))
def test_two_ranks_with_a_micro_batch_each_are_one_process_with_two(two, words):
    rollouts = [sampled(0), sampled(1)]
    alone = steps(learner_of(words), 2, rollouts)
    assert alone[0][0]["grad_norm"] > 0 and not all(map(torch.equal, alone[0][1], alone[1][1])), "it learns"
    for each in two.call(_steps, words, 2, rollouts):
        assert_the_same(each, alone)


@pytest.mark.parametrize(("words", "parts"), [(ALGOS[0], 1), (ALGOS[0], 3), (ALGOS[1], 2)])
def test_three_ranks_of_which_some_have_no_row_are_one_process(three, words, parts):
    rollouts = [sampled(0)]
    alone = steps(learner_of(words), parts, rollouts)
    for each in three.call(_steps, words, parts, rollouts):
        assert_the_same(each, alone)


@pytest.mark.parametrize(
    "words", marked([each for each in ALGOS if "lora" not in each and "master_weights" not in each])
)
def test_two_ranks_with_shards_and_a_micro_batch_each_are_one_process_with_two(two, words):
    rollouts = [sampled(0), sampled(1)]
    alone = steps(learner_of(words), 2, rollouts)
    for each in two.call(_steps, words, 2, rollouts, True):
        half = [
            [metrics, [mine.to(one.dtype) for mine, one in zip(weights, of_one, strict=True)]]
            for (metrics, weights), (_, of_one) in zip(each, alone, strict=True)
        ]
        assert_the_same(half, alone)


@pytest.mark.parametrize(("words", "parts"), [(ALGOS[0], 1), (ALGOS[1], 2), *map(slow, [(ALGOS[0], 3), (ALGOS[8], 2)])])
def test_three_ranks_with_shards_of_which_some_have_no_row_are_one_process(three, words, parts):
    rollouts = [sampled(0)]
    alone = steps(learner_of(words), parts, rollouts)
    for each in three.call(_steps, words, parts, rollouts, True):
        assert_the_same(each, alone)


def _uneven(ranks: Ranks, parts: int) -> list[Any]:
    return steps(learner_of(ALGOS[0], ranks, True), parts, [sampled(0)])


def test_shards_with_other_numbers_of_micro_batches_in_each_rank_do_not_hang_and_repeat(two):
    first, again = (two.call(_uneven, 5) for _ in range(2))
    assert_the_same(first[0], again[0])
    assert_the_same(first[0], first[1])
    (alone,) = steps(learner_of(ALGOS[0]), 5, [sampled(0)])
    assert first[0][0][0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)
    assert first[0][0][0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-5)


def _on_hosts(ranks: Ranks, hosts: int, parts: int, rollouts: Sequence[Rollouts]) -> list[Any]:
    """Of ranks that are spread over so many hosts, each of which holds all rows."""
    ranks.hosts = hosts
    try:
        return _steps(ranks, ALGOS[1], parts, rollouts, True)
    finally:
        ranks.hosts = 1


def test_two_hosts_that_hold_all_rows_each_and_have_a_micro_batch_each_are_one_process_with_two(two):
    rollouts = [sampled(0), sampled(1)]
    alone = steps(learner_of(ALGOS[1]), 2, rollouts)
    for each in two.call(_on_hosts, 2, 2, rollouts):
        assert_the_same(each, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "hosts"), [(4, 2), (3, 3)])
def test_hosts_of_two_ranks_that_hold_half_of_all_rows_each_or_three_of_one_stay_equal_and_repeat(ranks, hosts):
    rollouts = [sampled(0), sampled(1)]
    alone = steps(learner_of(ALGOS[1]), ranks, rollouts)
    with pool(ranks) as ready:
        first, again = (ready.call(_on_hosts, hosts, ranks, rollouts) for _ in range(2))
    for each in (*first, *again):
        assert_the_same(each, first[0])
    for (metrics, weights), (expected, of_one) in zip(first[0], alone, strict=True):
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6), "but for the order of sums: a host's first"
        assert all(torch.allclose(mine, one, rtol=0, atol=1e-5) for mine, one in zip(weights, of_one, strict=True))


def _tied(ranks: Ranks) -> tuple[bool, list[int]]:
    learner = learner_of(ALGOS[0], ranks, True)
    policy = learner.policy
    rows = [len(p.to_local()) for p in policy.parameters()]  # type: ignore[attr-defined]
    return policy.get_output_embeddings().weight is policy.get_input_embeddings().weight, rows


def test_sharded_embeddings_and_head_stay_tied_and_each_rank_holds_its_rows_alone(two):
    (tied, first), (_, second) = two.call(_tied)
    whole_rows = [len(p) for p in learner_of(ALGOS[0]).policy.parameters()]
    assert tied and [a + b for a, b in zip(first, second, strict=True)] == whole_rows


def _bytes_held(ranks: Ranks) -> tuple[int, int, dict[str, int]]:
    """Of the policy's shards, and of its moments, once a step was made; and what a check says."""
    learner = learner_of(f"trainer=sharded transfer.take=copy {ALGOS[6]}", ranks, True)
    split_into(learner, 2)
    learner.learn(learner.score(sampled(0)), REWARDS)
    parameters = list(learner.policy.parameters())
    held = [local_part(p) for p in parameters]
    states = [local_part(t) for state in learner.optimizer.state.values() for t in state.values()]
    count = Count(sum(p.numel() for p in parameters), len(parameters), 2)
    sizes = Sizes(policy=count, learning=count, backbone=count, hidden=16, slot=2 * count.elements)
    told = trainer(learner.config, sizes, ranks.count)
    return *(sum(t.numel() * t.element_size() for t in each) for each in (held, states)), told


def test_a_check_says_how_many_bytes_a_rank_with_shards_holds(two):
    (shards, moments, told), (others, more, _) = two.call(_bytes_held)
    assert shards + others == told["policy, whole gradients"], "fp32"
    assert told["policy, shards and their gradients"] == pytest.approx(shards + others, rel=0.01)
    assert told["policy, optimiser"] == pytest.approx((moments + more) / 2, rel=0.05)
    assert told["policy, whole while it computes"] * 2 == told["policy, whole gradients"]
    assert told["transfer, 2 slots"] == told["policy, whole while it computes"]


def _in_half_a_step(ranks: Ranks) -> list[bool]:
    """Trap: without a reshard before the optimiser's step the next pass sees the weights of before."""
    learner = learner_of(ALGOS[0], ranks, True)
    split_into(learner, 2)
    seen = []
    for seed in (0, 1):
        batch = learner.score(sampled(seed))
        learner.learn(batch, REWARDS)
        with learner.spread.whole(learner.policy), torch.no_grad():
            inside = [p.detach().clone() for p in learner.policy.parameters()]
        seen.append(all(map(torch.equal, inside, [whole(p.detach()) for p in learner.policy.parameters()])))
    return seen


def test_after_a_step_what_computes_has_the_weights_that_were_stepped(two):
    assert two.call(_in_half_a_step) == [[True, True]] * 2


def _laid(ranks: Ranks, sharded: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Weights that each rank has trained by itself to other last bits, and as they are once they lie over the ranks."""
    policy = learner_of(ALGOS[0]).policy.requires_grad_(False)
    for parameter in policy.parameters():
        parameter.add_(1e-6 * ranks.number)
    if not sharded:  # FSDP takes none that lie otherwise in memory
        odd = policy.get_input_embeddings()
        odd.weight = torch.nn.Parameter(odd.weight.t().contiguous().t(), requires_grad=False)
        policy.tie_weights()
    before = [p.clone() for p in policy.parameters()]
    spread = Sharded(ranks, torch.device("cpu")) if sharded else Whole(ranks)
    return before, [whole(p).clone() for p in spread.lay(policy).parameters()]


@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "sharded"])
def test_all_ranks_begin_with_the_weights_of_the_first(two, sharded):
    (first, laid), (second, laid_there) = two.call(_laid, sharded)
    assert not any(map(torch.equal, first, second))
    assert all(map(torch.equal, laid, first)) and all(map(torch.equal, laid_there, first))


class Lane(Ranks):
    """One process that computes the share of one of several ranks, and adds nothing up."""

    def __init__(self, lane: int, lanes: int) -> None:
        super().__init__()
        self.lane, self.lanes = lane, lanes

    def share(self, parts: Sequence[Any]) -> Sequence[Any]:
        return parts[len(parts) * self.lane // self.lanes : len(parts) * (self.lane + 1) // self.lanes]


def gradients(learner: Learner, parts: int, rollouts: Rollouts, ranks: Ranks) -> tuple[list[Tensor | None], float]:
    """Those of one update, and its loss, where the share is that of `ranks`; scores are those of all."""
    split_into(learner, parts)
    batch = learner.score(rollouts)
    learner.spread = Whole(ranks)
    taken: list[Tensor | None] = []

    def keep(loss_is_finite: bool) -> dict[str, float]:
        optimizers = [each for each in (learner.optimizer, learner.critic_optimizer) if each is not None]
        held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        taken.extend(None if p.grad is None else p.grad.clone() for p in held)
        return {}

    learner._step_optimizers = keep  # type: ignore[method-assign]
    return taken, learner.learn(batch, REWARDS)["loss"]


def _gradients(ranks: Ranks, words: str, parts: int, rollouts: Rollouts) -> tuple[list[Tensor | None], float]:
    return gradients(learner_of(words, ranks), parts, rollouts, ranks)


@pytest.mark.parametrize(("words", "parts"), [(ALGOS[1], 5), (ALGOS[6], 7), *map(slow, [(ALGOS[0], 3), (ALGOS[4], 5)])])
def test_uneven_shares_give_the_gradients_of_one_process_that_adds_share_by_share(two, words, parts):
    lanes = [gradients(learner_of(words), parts, sampled(0), Lane(lane, 2)) for lane in range(2)]
    added = [a if b is None else b if a is None else a + b for a, b in zip(*(g for g, _ in lanes), strict=True)]
    assert sum(each is not None for each in added) > 4
    for taken, loss in two.call(_gradients, words, parts, sampled(0)):
        assert all(a is b or torch.equal(a, b) for a, b in zip(taken, added, strict=True))
        assert loss == lanes[0][1] + lanes[1][1]


def test_the_same_number_of_ranks_gives_the_same_bits_again(two):
    first, again = (two.call(_steps, ALGOS[0], 5, [sampled(0)]) for _ in range(2))
    assert_the_same(first[0], again[0])


def _poisoned(ranks: Ranks) -> tuple[float, float]:
    learner = learner_of(ALGOS[0], ranks)
    split_into(learner, 2)
    batch = learner.score(sampled(0))
    plain = learner._accumulate

    def accumulate(part: Any, weights_B: Tensor) -> dict[str, Tensor]:
        sums = plain(part, weights_B)
        return {
            name: value * float("nan") if name == "loss" and ranks.number else value for name, value in sums.items()
        }

    learner._accumulate = accumulate  # type: ignore[method-assign]
    before = copy.deepcopy(list(learner.policy.parameters()))
    told = learner.learn(batch, REWARDS)
    moved = sum(float((p - q).abs().sum()) for p, q in zip(learner.policy.parameters(), before, strict=True))
    return told["skipped_updates"], moved


def test_a_loss_of_nan_in_one_rank_alone_is_a_step_that_all_skip(two):
    assert two.call(_poisoned) == [(1.0, 0.0)] * 2


# --- preference pairs -------------------------------------------------------------------------------------------------


def dpo_steps(tokens: int, spread: Whole) -> tuple[list[dict[str, float]], list[Tensor], int]:
    """Metrics of steps on pairs and of held-out ones, the weights in the end, and how many micro-batches a step has."""
    config = composed_run("algo=dpo", *MICRO, "model.context=16", f"tokens_per_microbatch={tokens}")
    tokenizer = make_tokenizer(config.model, LETTERS, chat=False)
    pairs = made(tokenizer), made(tokenizer)[:1]
    learner = DpoLearner(make_policy(config.model, tokenizer, seed=1), tokenizer, pairs, config, spread=spread)
    rows = range(len(pairs[0]))
    told = [learner.learn(rows), learner.measure(), learner.learn(rows[1:]), learner.measure()]
    weights = [p.detach().clone() for p in learner.policy.parameters()]
    return told, weights, len(list(learner._parts(learner.training.rows, rows)))


def _dpo_steps(ranks: Ranks, tokens: int) -> tuple[list[dict[str, float]], list[Tensor], int]:
    return dpo_steps(tokens, Whole(ranks))


def test_ranks_learn_from_pairs_as_one_process_does_also_where_held_out_ones_are_fewer_than_ranks(two):
    told, weights, parts = dpo_steps(60, Whole())
    assert parts == 2 and told[1]["loss"] != told[3]["loss"]
    for ours, trained, _ in two.call(_dpo_steps, 60):
        assert ours == told and all(map(torch.equal, trained, weights))


def test_ranks_with_other_numbers_of_micro_batches_of_pairs_do_not_hang_and_repeat(two):
    (first, weights, parts), (_, there, _) = two.call(_dpo_steps, 1)
    assert parts == 5 and all(map(torch.equal, weights, there))
    again, weights_again, _ = two.call(_dpo_steps, 1)[1]
    assert again == first and all(map(torch.equal, weights, weights_again))
    assert first[2]["loss"] == pytest.approx(dpo_steps(1, Whole())[0][2]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "parts"),
    [(ALGOS[0], 2), (ALGOS[1], 3), slow((ALGOS[1], 1)), slow((ALGOS[5], 2)), (ALGOS[6], 2), slow((ALGOS[3], 2))],
)
def test_gradients_that_are_added_up_in_the_last_backward_pass_are_those_of_one_process(three, words, parts):
    rollouts = [sampled(0), sampled(1)]
    alone = steps(learner_of(words, passes=Packed(compiled=False)), parts, rollouts)
    for each in three.call(_packed_steps, words, parts, rollouts):
        as_it_computes = [
            [metrics, [shards.to(tensor.dtype) for shards, tensor in zip(weights, of_one, strict=True)]]
            for (metrics, weights), (_, of_one) in zip(each, alone, strict=True)
        ]
        assert_the_same(as_it_computes, alone)


def _where_added(ranks: Ranks, parts: int) -> list[bool]:
    """Whether the gradients of each of two steps had been added up before the update asked for it."""
    learner, added = learner_of(ALGOS[0], ranks, sharded=True, passes=Packed(compiled=False)), []
    add, spread = learner.spread.add_gradients, learner.spread
    assert isinstance(spread, Sharded)

    def noting(*arguments: Any) -> None:
        added.append(spread._added)
        add(*arguments)

    spread.add_gradients = noting  # type: ignore[method-assign]
    steps(learner, parts, [sampled(0), sampled(1)])
    return added


def test_a_rank_with_packed_rows_adds_up_in_its_last_backward_pass_and_one_without_rows_by_one_token(three):
    assert three.call(_where_added, 2) == [[False] * 2, [True] * 2, [True] * 2]


def _steps_after_a_trial(ranks: Ranks, words: str, tried: bool) -> list[Any]:
    learner = learner_of(words, ranks, sharded=True, passes=Packed(compiled=False))
    if tried:
        with learner.spread.whole(learner.critic, learner.policy):
            for _ in range(2 + ranks.number):  # no trial needs the other rank
                learner.drop_gradients(random_batch(learner.policy, [4], [0, 0], [5, 3]))
    return steps(learner, 2, [sampled(0), sampled(1)])


@pytest.mark.parametrize("words", [f"{ALGOS[6]} algo.entropy_coef=0.1", slow((f"{ALGOS[1]} algo.entropy_coef=0.1",))])
def test_what_a_trial_of_a_micro_batch_leaves_is_in_no_update_of_shards(two, words):
    plain, tried = (two.call(_steps_after_a_trial, words, after) for after in (False, True))
    for ours, theirs in zip(tried, plain, strict=True):
        assert_the_same(ours, theirs)
