"""trainer.gather=layer: layers are gathered pass by pass, in lockstep, and no rank holds all of a model at once.

With one micro-batch a rank, or none, all is that of one process, to the bit; with more, gradients are added up in
another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from composed import composed_run
from test_dpo import LETTERS, made
from test_learner import sampled
from test_ranks_learner import ALGOS, MICRO, REWARDS, assert_the_same, learner_of, split_into, steps, whole
from test_ranks_stages import TOKENS, of_ranks, warmed_up
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from rlhf.learning.by_layer import ByLayer
from rlhf.learning.forward import Batch
from rlhf.learning.learner import Learner
from rlhf.learning.pass_choice import random_batch
from rlhf.learning.passes import PADDED, WHOLE, Packed, Passes
from rlhf.learning.spread import Whole, groups_of
from rlhf.models.policy import make_policy
from rlhf.models.tokenizer import make_tokenizer
from rlhf.preflight.memory_estimate import Sizes, trainer
from rlhf.preflight.policy_sizes import count
from rlhf.ranks.ranks import ALONE, Ranks
from rlhf.stages.dpo import DpoLearner
from rlhf.types import Completion, Rollouts

PASSES: dict[str, Passes] = {"padded": PADDED, "whole": WHOLE, "packed": Packed(compiled=False)}
GRPO, PPO, GSPO, _, _, CHECKPOINTING, HALF, *_ = ALGOS
CPU = torch.device("cpu")
LAYERS = 5


def layered(words: str, ranks: Ranks, passes: str, reshard: bool = True) -> Learner:
    """A learner whose models are gathered layer by layer."""
    return learner_of(words, ranks, ByLayer(ranks, CPU, reshard), PASSES[passes].in_lockstep())


def _steps(ranks: Ranks, words: str, passes: str, parts: int, rollouts: Sequence[Rollouts]) -> list[Any]:
    return steps(layered(words, ranks, passes), parts, rollouts)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        (f"{GRPO} model.layers=2", "padded"),
        slow(PPO, "packed"),
        slow(f"{PPO} model.layers=2", "padded"),
        slow(GRPO, "whole"),
        slow(GSPO, "padded"),
        slow(GSPO, "packed"),
        slow(f"{CHECKPOINTING} model.layers=2", "padded"),
        slow(CHECKPOINTING, "packed"),
        slow(HALF, "packed"),
        slow(f"{GRPO} updates_per_step=2 algo.kl_coef=0.1 algo.ref_every=1", "packed"),
    ],
)
@pytest.mark.parametrize("ranks", [2, slow(3)])
def test_a_micro_batch_a_rank_or_none_gives_all_numbers_and_weights_of_one_process(request, ranks, words, passes):
    rollouts = [sampled(0), sampled(1)]
    alone = steps(learner_of(words, passes=PASSES[passes]), 2, rollouts)
    assert alone[0][0]["grad_norm"] > 0 and not all(map(torch.equal, alone[0][1], alone[1][1])), "it learns"
    for each in request.getfixturevalue({2: "two", 3: "three"}[ranks]).call(_steps, words, passes, 2, rollouts):
        as_it_computes = [
            [metrics, [mine.to(one.dtype) for mine, one in zip(weights, of_one, strict=True)]]
            for (metrics, weights), (_, of_one) in zip(each, alone, strict=True)
        ]
        assert_the_same(as_it_computes, alone)


def gradients(learner: Learner, parts: int, rollouts: Rollouts) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Those of one update, all ranks' together, and its numbers."""
    split_into(learner, parts)
    taken: list[torch.Tensor] = []

    def keep(loss_is_finite: bool) -> dict[str, float]:
        optimizers = [each for each in (learner.optimizer, learner.critic_optimizer) if each is not None]
        held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        taken.extend(whole(p.grad).clone() for p in held)
        return {}

    learner._step_optimizers = keep  # type: ignore[method-assign]
    return taken, learner.learn(learner.score(rollouts), REWARDS)


def _gradients(ranks: Ranks, words: str, passes: str, parts: int) -> tuple[list[torch.Tensor], dict[str, float]]:
    return gradients(layered(words, ranks, passes), parts, sampled(0))


@pytest.mark.parametrize(
    ("ranks", "words", "passes", "parts"),
    [
        (2, PPO, "padded", 5),
        slow(3, GRPO, "packed", 4),
        slow(2, GRPO, "padded", 7),
        slow(2, GSPO, "padded", 5),
        slow(3, PPO, "packed", 7),
        slow(3, PPO, "padded", 4),
        slow(3, CHECKPOINTING, "padded", 5),
    ],
)
def test_uneven_numbers_of_micro_batches_do_not_hang_are_close_to_one_process_and_repeat(
    request, ranks, words, passes, parts
):
    of_one, numbers = gradients(learner_of(words, passes=PASSES[passes]), parts, sampled(0))
    ready = request.getfixturevalue({2: "two", 3: "three"}[ranks])
    first, again = (ready.call(_gradients, words, passes, parts) for _ in range(2))
    for taken, told in [*first, *again]:
        assert all(map(torch.equal, taken, first[0][0])) and told == first[0][1]
        for mine, one in zip(taken, of_one, strict=True):
            assert float((mine - one).norm()) <= 1e-6 * max(float(one.norm()), 1e-3)
        assert told == pytest.approx(numbers, rel=1e-6, abs=1e-9)


# --- rows that would take other numbers of passes ---------------------------------------------------------------------


def batch_of(model: Any, lengths: Sequence[int]) -> Batch:
    return random_batch(model, [3] * len(lengths), range(len(lengths)), lengths)


@pytest.mark.parametrize("passes", ["padded", "whole", "packed"])
def test_in_lockstep_any_rows_take_as_many_passes_and_have_the_same_log_probs(passes):
    policy = learner_of(f"{GRPO} model.context=128").policy
    shapes = {"one token each": [1, 1], "nothing": [0, 1], "short and long": [2] * 32 + [90], "alike": [5, 6]}
    plain, lockstep = PASSES[passes], PASSES[passes].in_lockstep()
    went: dict[str, list[int]] = {"plain": [], "lockstep": []}
    for lengths in shapes.values():
        batch = batch_of(policy, [max(1, length) for length in lengths])
        batch.mask_BT *= torch.tensor(lengths)[:, None] > 0
        said = []
        for name, way in (("plain", plain), ("lockstep", lockstep)):
            counted: list[int] = []
            handle = policy.base_model.layers[0].register_forward_hook(lambda *_, to=counted: to.append(1))  # type: ignore
            logprobs_BT = way.logprobs(policy, batch, 1.0)
            handle.remove()
            logprobs_BT.sum().backward()  # also where nothing counts
            went[name].append(len(counted))
            said.append(logprobs_BT * batch.mask_BT)
        torch.testing.assert_close(said[1], said[0], rtol=1e-5, atol=1e-5)
    assert len(set(went["lockstep"])) == 1
    assert passes == "packed" or len(set(went["plain"])) > 1, "else this test tries nothing"


def _of_other_lengths(ranks: Ranks, passes: str) -> list[Any]:
    """The first rank's rows have a token each, the second's are few long and many short ones."""
    learner = layered(f"{PPO} model.context=128 rollout.max_new_tokens=90", ranks, passes)
    learner._microbatches = lambda batch, rows: [list(rows)[:2], list(rows)[2:]]  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(5)
    rows = [[1], [2], *([3, 4] for _ in range(32)), torch.randint(1, 9, (90,), generator=generator).tolist(), [5]]
    said = [Completion(row, [-1.0] * len(row), [0] * len(row), "stop") for row in rows]
    rollouts = Rollouts(sampled(0).prompts[:2], said, [""] * len(said), [0, 1], 18)
    told = learner.learn(learner.score(rollouts), [float(b % 3) for b in range(36)])
    return [[told, [whole(p.detach()).clone() for p in learner.policy.parameters()]]]


@pytest.mark.parametrize("passes", ["padded", slow("whole"), slow("packed")])
def test_micro_batches_that_would_take_other_numbers_of_passes_do_not_hang(two, passes):
    first, second = two.call(_of_other_lengths, passes)
    assert_the_same(first, second)
    assert first[0][0]["grad_norm"] > 0


# --- memory -----------------------------------------------------------------------------------------------------------


@contextmanager
def watched(models: Sequence[Any]) -> Iterator[dict[str, int]]:
    """The most groups that are whole at once, and the most bytes that were gathered."""
    most = {"groups": 0, "bytes": 0}
    held = [group._get_fsdp_state()._fsdp_param_group for model in models for group in groups_of(model)]
    plain = FSDPParamGroup.unshard, FSDPParamGroup._to_unsharded

    def of(group: Any) -> int:
        sizes = (each._orig_size.numel() for each in group.fsdp_params)
        return sum(sizes) * (group.fsdp_params[0].param_dtype or torch.float32).itemsize

    def look() -> None:
        unsharded = [group for group in held if group.is_unsharded]
        under_way = [group for group in held if group._all_gather_result is not None]
        most["groups"] = max(most["groups"], len(unsharded))
        most["bytes"] = max(most["bytes"], sum(map(of, [*unsharded, *under_way])))

    def noting(function: Any) -> Any:
        def call(group: Any, *arguments: Any) -> None:
            function(group, *arguments)
            look()

        return call

    FSDPParamGroup.unshard, FSDPParamGroup._to_unsharded = map(noting, plain)
    try:
        yield most
    finally:
        FSDPParamGroup.unshard, FSDPParamGroup._to_unsharded = plain


def _whole_at_once(ranks: Ranks, words: str, passes: str, reshard: bool) -> tuple[dict[str, int], dict[str, int]]:
    """What of the policy was whole at once in a step of four micro-batches, and what a check says."""
    trainer_words = f"trainer=sharded trainer.gather=layer trainer.reshard={str(reshard).lower()} transfer.take=copy"
    words = f"{words} model.layers={LAYERS} {trainer_words}"
    policy = learner_of(words).policy
    counted, layers = count(policy.parameters()), [count(each.parameters()) for each in policy.base_model.layers]
    sizes = Sizes(
        policy=counted,
        learning=counted,
        backbone=counted,
        hidden=16,
        slot=counted.nbytes,
        layers=sum(each.elements for each in layers),
        largest=max(each.elements for each in layers),
    )
    learner = layered(words, ranks, passes, reshard)
    told = trainer(learner.config, sizes, ranks.count)
    split_into(learner, 4)
    with watched([learner.policy]) as most:
        learner.learn(learner.score(sampled(0)), REWARDS)
    assert not any(group._get_fsdp_state()._fsdp_param_group.is_unsharded for group in groups_of(learner.policy))
    return most, told


@pytest.mark.parametrize(("words", "passes"), [slow(GRPO, "padded"), (HALF, "packed"), slow(CHECKPOINTING, "padded")])
def test_a_rank_never_holds_more_than_the_root_and_two_layers_which_is_what_a_check_says(two, words, passes):
    for most, told in two.call(_whole_at_once, words, passes, True):
        assert most["groups"] == 2, "of six: the root and a layer"
        assert most["bytes"] == told["policy, what is whole at once"]
        assert told["policy, gradients of that"] == told["policy, what is whole at once"] * (2 if words == HALF else 1)
        whole_gradients = told["policy, shards and their gradients"] if passes == "padded" else 0
        assert told.get("policy, gradients that wait", 0) == whole_gradients


def _order(ranks: Ranks, passes: str) -> list[int]:
    """In which of its backward passes of one micro-batch each layer is reduced, as they end."""
    learner = layered(f"{GRPO} model.layers={LAYERS}", ranks, passes)
    learner.learn(learner.score(sampled(0)), REWARDS)
    passed: dict[int, int] = {}
    reduced: list[int] = []
    plain = FSDPParamGroup.post_backward

    def noting(group: Any, *arguments: Any) -> None:
        passed[id(group)] = passed.get(id(group), 0) + 1
        had = any(each.unsharded_param.grad is not None for each in group.fsdp_params)
        plain(group, *arguments)
        if had:
            reduced.append(passed[id(group)])

    FSDPParamGroup.post_backward = noting
    try:
        split_into(learner, ranks.count)
        learner.learn(learner.score(sampled(0)), REWARDS)
    finally:
        FSDPParamGroup.post_backward = plain
    return reduced


@pytest.mark.slow
@pytest.mark.parametrize(("passes", "last"), [("padded", 2), ("packed", 1)])
def test_gradients_of_padded_responses_wait_for_those_of_prompts_and_packed_ones_are_reduced_at_once(two, passes, last):
    root = 1  # once, when all is done
    for reduced in two.call(_order, passes):
        assert reduced == [*[last] * LAYERS, root]


@pytest.mark.slow
def test_without_resharding_all_layers_are_kept_until_their_backward_pass_which_is_what_a_check_says(two):
    for most, told in two.call(_whole_at_once, GRPO, "padded", False):
        assert most["groups"] == LAYERS + 1
        assert told["policy, what is whole at once"] == told["policy, shards and their gradients"]
        kept, largest = told["policy, what is whole at once"], most["bytes"] - told["policy, what is whole at once"]
        assert 0 < largest <= kept / LAYERS, "a buffer of the layer that is gathered"


def _noted(ranks: Ranks) -> list[int]:
    """Passes that FSDP remembers of the reference, which has no backward pass, after each of some steps."""
    learner = layered(f"{GRPO} algo.kl_coef=0.1", ranks, "padded")
    assert learner.reference is not None
    order = learner.reference._get_fsdp_state()._comm_ctx.post_forward_order  # type: ignore[operator]
    split_into(learner, 2)
    noted = []
    for seed in range(2):
        learner.learn(learner.score(sampled(seed)), REWARDS)
        noted.append(len(order))
    return noted


def test_passes_without_gradients_leave_nothing_behind(two):
    assert two.call(_noted) == [[0, 0]] * 2


# --- other stages -----------------------------------------------------------------------------------------------------


def _warmed_up(ranks: Ranks, tokens: int, words: str) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    return warmed_up(tokens, ByLayer(ranks, CPU), words)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parts"), [(2, 2), (3, 2), (3, 1)])
def test_sft_by_layer_is_that_of_one_process_where_a_rank_has_one_micro_batch_or_none(request, ranks, parts):
    tokens, words = TOKENS["sft"][parts - 1], "model.layers=2"
    alone, had = of_ranks(ALONE, "sft", tokens, words)
    assert had == [parts] * 3
    for told, weights in request.getfixturevalue({2: "two", 3: "three"}[ranks]).call(_warmed_up, tokens, words):
        assert told == alone[0] and all(map(torch.equal, weights, alone[1]))


@pytest.mark.slow
def test_sft_by_layer_with_other_numbers_of_micro_batches_does_not_hang_and_repeats(two):
    first, again = (two.call(_warmed_up, 1, "") for _ in range(2))
    for told, weights in [*first, *again]:
        assert told == first[0][0] and all(map(torch.equal, weights, first[0][1]))
    alone, _ = of_ranks(ALONE, "sft", 1)
    assert [step["loss"] for step in first[0][0]] == pytest.approx([step["loss"] for step in alone[0]], rel=1e-6)


def dpo_steps(tokens: int, spread: Whole, passes: Passes = PADDED) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    """Numbers of steps on pairs and of held-out ones, and the weights in the end."""
    config = composed_run("algo=dpo", *MICRO, "model.context=16", f"tokens_per_microbatch={tokens}")
    tokenizer = make_tokenizer(config.model, LETTERS, chat=False)
    pairs = made(tokenizer), made(tokenizer)[:1]
    policy = spread.lay(make_policy(config.model, tokenizer, seed=1))
    learner = DpoLearner(policy, tokenizer, pairs, config, passes, spread)
    rows = range(len(pairs[0]))
    told = [learner.learn(rows), learner.measure(), learner.learn(rows[1:]), learner.measure()]
    return told, [whole(p.detach()).clone() for p in policy.parameters()]


def _dpo_steps(ranks: Ranks, tokens: int, passes: str) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    return dpo_steps(tokens, ByLayer(ranks, CPU), PASSES[passes].in_lockstep())


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "passes"), [(2, "padded"), (3, "packed")])
def test_pairs_by_layer_are_those_of_one_process_also_where_held_out_ones_are_fewer_than_ranks(request, ranks, passes):
    told, weights = dpo_steps(60, Whole(), PASSES[passes])
    for ours, trained in request.getfixturevalue({2: "two", 3: "three"}[ranks]).call(_dpo_steps, 60, passes):
        assert ours == told and all(map(torch.equal, trained, weights))


@pytest.mark.parametrize("ranks", [2, slow(3)])
def test_pairs_by_layer_with_other_numbers_of_micro_batches_do_not_hang_and_repeat(request, ranks):
    ready = request.getfixturevalue({2: "two", 3: "three"}[ranks])
    first, again = (ready.call(_dpo_steps, 1, "padded") for _ in range(2))
    for told, weights in [*first, *again]:
        assert told == first[0][0] and all(map(torch.equal, weights, first[0][1]))
    assert first[0][0][0] == pytest.approx(dpo_steps(1, Whole())[0][0], rel=1e-6, abs=1e-9)


# --- trials of micro-batches ------------------------------------------------------------------------------------------


def _steps_after_a_trial(ranks: Ranks, tried: bool) -> list[Any]:
    learner = layered(PPO, ranks, "packed")
    if tried:
        with learner.spread.whole(learner.critic, learner.policy):
            for _ in range(2):
                learner.drop_gradients(random_batch(learner.policy, [4], [0, 0], [5, 3]))
    return steps(learner, 2, [sampled(0)])


@pytest.mark.slow
def test_what_a_trial_of_a_micro_batch_leaves_is_in_no_update(two):
    plain, tried = (two.call(_steps_after_a_trial, after) for after in (False, True))
    for ours, theirs in zip(tried, plain, strict=True):
        assert_the_same(ours, theirs)
