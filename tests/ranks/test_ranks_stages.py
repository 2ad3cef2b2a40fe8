"""SFT and the training of reward models by several ranks: the losses and weights of one process, to the bit.

With one micro-batch a rank, or none, those of one process with all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composed import composed_run
from torch import Tensor

from rlhf.assembly.layout import lay_out
from rlhf.assembly.matter import Matter
from rlhf.assembly.site import Site
from rlhf.assembly.warm_up import warm_up
from rlhf.config import AdamWConfig, ModelRewardConfig, SftConfig
from rlhf.learning.microbatched import MicroBatched
from rlhf.learning.spread import Sharded, Whole
from rlhf.models.policy import make_policy
from rlhf.models.tokenizer import make_tokenizer
from rlhf.models.value import Head, score_layer, value_model
from rlhf.monitor.heartbeat import Heartbeat
from rlhf.monitor.progress import Bars
from rlhf.ranks.place import Place
from rlhf.ranks.ranks import Ranks
from rlhf.stages.reward_model import train_reward_model
from rlhf.stages.sft import sft
from rlhf.types import Pair, Prompt
from transfer.agreement.dtensor import is_dtensor

MICRO = ("model.layers=1", "model.hidden=16", "model.heads=2", "model.intermediate=24", "model.context=32")
TEXTS = ["ab", "cdefghi", "a", "bcdef", "ihg", "fedc", "gh"]
Told = tuple[list[dict[str, float]], list[Tensor]]  # numbers of each step, and the weights in the end


def micro_model(words: str = "") -> tuple[Any, Any]:
    """A policy and its tokenizer, the same in every process."""
    config = composed_run(*MICRO, *words.split())
    tokenizer = make_tokenizer(config.model, "abcdefghi", chat=False)
    return make_policy(config.model, tokenizer, seed=1), tokenizer


def asked(tokenizer: Any, text: str) -> Prompt:
    return Prompt(text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if is_dtensor(tensor) else tensor).detach().clone()


def warmed_up(tokens: int, spread: Whole, words: str = "") -> Told:
    """Three steps of SFT on all demonstrations each."""
    policy, tokenizer = micro_model(words)
    spread.lay(policy)
    demonstrations = [(asked(tokenizer, text), text[::-1]) for text in TEXTS]
    config = SftConfig(steps=3, batch_size=len(TEXTS), lr=0.01)
    by = MicroBatched(AdamWConfig(), tokens, spread)
    told = list(sft(policy, tokenizer, demonstrations, config, by, seed=0))
    return told, [whole(p) for p in policy.parameters()]


def reward_trained(tokens: int, spread: Whole, words: str = "") -> Told:
    """Three steps on the pairs of all prompts each; one prompt has three."""
    policy, tokenizer = micro_model(words)
    model = value_model(policy, Head.sequence)
    torch.nn.init.normal_(score_layer(model).weight, std=0.5, generator=torch.Generator().manual_seed(2))
    spread.lay(model)
    pairs = [Pair(asked(tokenizer, text), text, text[::-1] + "a") for text in TEXTS]
    pairs += [Pair(pairs[0].prompt, text, "i") for text in ("aa", "bb")]
    config = ModelRewardConfig(steps=3, lr=0.01, prompts_per_batch=len(TEXTS), centring=0.1)
    by = MicroBatched(AdamWConfig(), tokens, spread)
    told = list(train_reward_model(model, tokenizer, pairs, config, by, seed=0))
    return told, [whole(p) for p in model.parameters()]


STAGES = {"sft": warmed_up, "reward model": reward_trained}
TOKENS = {"sft": [1000, 45, 30], "reward model": [1000, 120, 80]}  # of a micro-batch, for one a step, two, three


def of_ranks(ranks: Ranks, stage: str, tokens: int, words: str = "", sharded: bool = False) -> tuple[Told, list[int]]:
    """What comes of a stage in this rank, and how many micro-batches it has had at each step."""
    had: list[int] = []
    share = ranks.share

    def noting(parts: Sequence[Any]) -> Sequence[Any]:
        mine = share(parts)
        had.append(len(mine))
        return mine

    ranks.share = noting  # type: ignore[method-assign]
    try:
        spread = Sharded(ranks, torch.device("cpu")) if sharded else Whole(ranks)
        return STAGES[stage](tokens, spread, words), had
    finally:
        del ranks.share  # type: ignore[method-assign]


def assert_the_same(ours: Told, theirs: Told) -> None:
    (told, weights), (expected, of_one) = ours, theirs
    assert told == expected and len(weights) == len(of_one)
    assert all(torch.equal(mine.to(one.dtype), one) for mine, one in zip(weights, of_one, strict=True))


WHOLE, SHARDED, REWARD = ("sft", False), ("sft", True), ("reward model", False)  # whose weights are whole in each rank


@pytest.mark.parametrize("words", ["", "model.dtype=bfloat16 model.gradient_checkpointing=true"])
@pytest.mark.parametrize(("stage", "sharded"), [WHOLE, SHARDED, REWARD])
def test_two_ranks_with_a_micro_batch_each_are_one_process_with_two(two, stage, sharded, words):
    tokens = TOKENS[stage][1]
    alone, had = of_ranks(Ranks(), stage, tokens, words)
    assert had == [2] * 3 and len({step["loss"] for step in alone[0]}) == 3, "it learns"
    for ours, had in two.call(of_ranks, stage, tokens, words, sharded):
        assert had == [1] * 3
        assert_the_same(ours, alone)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(("stage", "sharded"), [WHOLE, SHARDED, REWARD])
def test_three_ranks_of_which_some_have_no_row_are_one_process(three, stage, sharded, parts):
    tokens = TOKENS[stage][parts - 1]
    alone, had = of_ranks(Ranks(), stage, tokens)
    assert had == [parts] * 3
    each = three.call(of_ranks, stage, tokens, "", sharded)
    assert sorted(had[0] for _, had in each) == [0] * (3 - parts) + [1] * parts
    for ours, _ in each:
        assert_the_same(ours, alone)


@pytest.mark.parametrize(("stage", "sharded"), [WHOLE, SHARDED, REWARD])
def test_ranks_with_other_numbers_of_micro_batches_do_not_hang_and_repeat(two, stage, sharded):
    runs = [two.call(of_ranks, stage, 1, "", sharded) for _ in range(2)]
    (first, _), *_ = runs[0]
    assert len({had[0] for _, had in runs[0]}) == 2, "shares are uneven"
    for ours, _ in [*runs[0], *runs[1]]:
        assert_the_same(ours, first)
    alone, _ = of_ranks(Ranks(), stage, 1000)
    assert [step["loss"] for step in first[0]] == pytest.approx([step["loss"] for step in alone[0]], rel=1e-4)


# --- models of a run --------------------------------------------------------------------------------------------------


def models_after_the_warm_up(ranks: Ranks, words: str) -> dict[str, list[Tensor]]:
    """Weights of the policy and of all that is made of it, as RL begins."""
    sharded = ["trainer=sharded", f"trainer.ranks={ranks.count}"] if ranks.count > 1 else []
    warm = ["sft.steps=3", f"sft.batch_size={len(TEXTS)}", f"tokens_per_microbatch={TOKENS['sft'][1]}"]
    config = composed_run(*MICRO, *warm, "reward=model", "transfer.take=copy", *sharded, *words.split())
    bars = Bars(on=False)
    site = Site(config, Path(), bars, Heartbeat(Path(), bars.pulse, bars.say), 0.0, Place(), ranks)
    policy, tokenizer = micro_model(words)
    task: Any = SimpleNamespace(demonstrations=[(asked(tokenizer, text), text[::-1]) for text in TEXTS])
    matter = Matter(task, tokenizer, policy, {})
    warm_up(site, matter, None)
    assert matter.spread.sharded == (ranks.count > 1), "before it"
    if not matter.spread.sharded:
        lay_out(site, matter)
    assert matter.reference is not None and matter.critic is not None
    models = {"policy": policy, "reference": matter.reference, "critic": matter.critic, **matter.untrained}
    assert {name for name, model in models.items() if any(map(is_dtensor, model.parameters()))} == (
        {"policy", "reference", "critic"} if ranks.count > 1 else set()
    )
    return {name: [whole(p) for p in model.parameters()] for name, model in models.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_that_are_sharded_before_the_warm_up_are_those_that_one_process_makes_after_it(two, dtype):
    words = f"algo=ppo algo.kl_coef=0.1 model.dtype={dtype}"
    alone = models_after_the_warm_up(Ranks(), words)
    assert list(alone) == ["policy", "reference", "critic", ""]
    assert not all(map(torch.equal, alone["policy"], micro_model(words)[0].parameters())), "it has learned"
    for ours in two.call(models_after_the_warm_up, words):
        for name, weights in alone.items():
            assert all(torch.equal(mine, one.to(mine.dtype)) for mine, one in zip(ours[name], weights, strict=True))
