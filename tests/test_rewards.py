"""Rewards: what a failure costs, what a sum is of, and what of it a run reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import floats, lists, none
from test_rewards_http import Server

from rlhf.config import (
    AdamWConfig,
    Device,
    FunctionRewardConfig,
    ModelRewardConfig,
    RewardPart,
    SumRewardConfig,
    TinyModelConfig,
)
from rlhf.learning.microbatched import MicroBatched
from rlhf.models.policy import make_policy
from rlhf.models.reward_model import load_reward_model
from rlhf.models.saving import save_model
from rlhf.models.tokenizer import make_tokenizer
from rlhf.models.value import Head, value_model
from rlhf.monitor.metrics import Outlets, Recorder
from rlhf.monitor.progress import Bars
from rlhf.rewards import FunctionReward, WeightedSum, combine, usable
from rlhf.rewards.model import ModelReward
from rlhf.run import run
from rlhf.shell.ending import RunError
from rlhf.stages.reward_model import answers_of, margins, micro_batches, pair_scores, train_reward_model
from rlhf.types import Pair, Prompt, RewardReport
from transfer.agreement.journal import Journal

SMALL = ("experiment=smoke", "task.prompts=256", "sft.steps=20", "logger=jsonl", "transfer=local")
SMOKE = (*SMALL, "steps=3", "evaluate_every=3")
PROMPTS = [Prompt(f"{n}?", (n,), {"answer": n}) for n in range(6)]
ANSWERS = ["", "a", "bb", "ccc", "dddd", "eeeee"]

FUNCTIONS = """
calls = []

def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def not_of_bb(prompts, completions, answer, **columns):
    calls.append(len(completions))
    return [1.0 / (text != "bb") + number for text, number in zip(completions, answer, strict=True)]

def raises(prompts, completions, **columns):
    raise KeyError("topic")

def only_alone(prompts, completions, **columns):
    return [1.0] * (len(completions) == 1)

def even_or_raise(prompts, completions, **columns):
    if any(len(text) % 2 for text in completions):
        raise ValueError("odd")
    return [1.0] * len(completions)
"""

rewards_of = st.integers(1, 8).flatmap(
    lambda samples: lists(lists(none() | floats(-1e6, 1e6), min_size=samples, max_size=samples), min_size=1, max_size=4)
)


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    """The module `graded` on the path."""
    (tmp_path / "graded.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "graded", raising=False)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[dict[str, float]]:
    return [row for row in rows(folder) if "train/loss" in row]


# --- the user's function ----------------------------------------------------------------------------------------------


def test_one_bad_sample_costs_one_sample():
    reward = FunctionReward("graded:not_of_bb")
    assert reward(PROMPTS, ANSWERS) == [1.0, 2.0, None, 4.0, 5.0, 6.0]
    assert sys.modules["graded"].calls == [6, 1, 1, 1, 1, 1, 1], "all at once, then one by one"
    assert reward.report.errors == 1
    assert "graded:not_of_bb raised ZeroDivisionError: " in reward.report.error
    assert "graded.py:9)" in reward.report.error


def test_a_function_that_does_not_raise_is_called_once_and_has_no_errors():
    reward = FunctionReward("graded:not_of_bb")
    reward(PROMPTS, ANSWERS)
    assert reward(PROMPTS[:2], ANSWERS[:2]) == [1.0, 2.0]
    assert sys.modules["graded"].calls[7:] == [2] and reward.report == RewardReport(errors=0)


def test_a_function_that_always_raises_rewards_nothing_and_says_why():
    reward = FunctionReward("graded:raises")
    assert reward(PROMPTS, ANSWERS) == [None] * 6
    assert reward.report.errors == 6 and "raised KeyError: 'topic'" in reward.report.error


def test_a_wrong_number_of_rewards_is_no_failure_of_one_sample_but_of_the_function():
    with pytest.raises(ValueError, match=r"graded:only_alone must return a list of 6 numbers or None \(got 0 values\)"):
        FunctionReward("graded:only_alone")(PROMPTS, ANSWERS)


@given(lists(none() | floats(-1, 1), min_size=1, max_size=20), floats(0, 1))
def test_the_run_stops_exactly_where_more_than_the_allowed_share_has_no_reward(rewards, max_failed):
    missing = rewards.count(None)
    if missing / len(rewards) <= max_failed:
        assert usable(rewards, max_failed) == rewards
    else:
        with pytest.raises(RunError, match=rf"^{missing} of {len(rewards)} samples .*\(reward\.max_failed\): why$"):
            usable(rewards, max_failed, "why")


# --- a weighted sum ---------------------------------------------------------------------------------------------------


@given(rewards_of, st.data())
def test_a_sum_is_the_weighted_sum_of_its_parts_and_nothing_where_one_has_nothing(parts, data):
    weights = data.draw(lists(floats(-10, 10), min_size=len(parts), max_size=len(parts)))
    samples = len(parts[0])
    named = {
        f"part{i}": (weight, lambda prompts, answers, values=values: list(values))
        for i, (weight, values) in enumerate(zip(weights, parts, strict=True))
    }
    total = WeightedSum(named)
    for sample, reward in enumerate(total(PROMPTS[:1] * samples, ["a"] * samples)):
        column = [values[sample] for values in parts]
        if None in column:
            assert reward is None
        else:
            assert reward == pytest.approx(sum(w * v for w, v in zip(weights, column, strict=True)), abs=1e-6)
    for i, values in enumerate(parts):
        there = [value for value in values if value is not None]
        assert (f"part{i}" in total.report.means) == bool(there)
        if there:
            assert total.report.means[f"part{i}"] == pytest.approx(sum(there) / len(there), abs=1e-6)
    assert total.report.errors is None, "none of these can raise"


def test_a_sum_counts_the_errors_of_its_parts_and_names_their_keys():
    parts = {"good": "graded:length", "bad": "graded:not_of_bb", "odd": "graded:even_or_raise"}
    config = SumRewardConfig(parts={n: RewardPart(FunctionRewardConfig(function=f)) for n, f in parts.items()})
    reward = combine(config, {name: FunctionReward(function) for name, function in parts.items()})
    assert reward(PROMPTS, ANSWERS) == [0 + 1 + 1, None, None, None, 4 + 5 + 1, None]
    assert reward.report.errors == 1 + 3
    assert reward.report.error.startswith("reward.parts.bad.function=graded:not_of_bb raised ZeroDivisionError")
    assert reward.report.means == {"good": 2.5, "bad": pytest.approx(18 / 5), "odd": 1.0}


def test_what_ends_the_run_in_a_part_is_told_by_the_parts_key():
    reward = WeightedSum({"brief": (0.5, FunctionReward("graded:only_alone"))})
    with pytest.raises(ValueError, match=r"^reward\.parts\.brief\.function=graded:only_alone must return a list of 6"):
        reward(PROMPTS, ANSWERS)


# --- a reward model ---------------------------------------------------------------------------------------------------


def reward_model() -> ModelReward:
    tiny = TinyModelConfig(layers=1, hidden=16, heads=2, intermediate=24, context=32, device=Device.cpu)
    tokenizer = make_tokenizer(tiny, "0123456789?abcde", chat=False)
    return ModelReward(value_model(make_policy(tiny, tokenizer, seed=0), Head.sequence), tokenizer)


PAIRS = [Pair(prompt, chosen, rejected) for prompt in PROMPTS for chosen, rejected in (("a", "b"), ("aa", "ab"))]


def trained(tokens: int = 1000, **options: float) -> ModelReward:
    reward = reward_model()
    config = ModelRewardConfig(**{"steps": 30, "lr": 1e-2, "prompts_per_batch": 6} | options)
    by = MicroBatched(AdamWConfig(), tokens)
    for numbers in train_reward_model(reward.model, reward.tokenizer, PAIRS, config, by, seed=0):
        assert set(numbers) == {"loss", "accuracy", "margin"}
    return reward


@pytest.mark.parametrize("budget", [1, 8, 20, 60, 1000])
def test_pairs_are_computed_in_micro_batches_of_so_many_tokens_with_all_pairs_of_a_prompt_that_fit(budget):
    sides = [("a", "b"), ("a", "c"), ("b", "c")]
    groups = [[Pair(Prompt("?" * n, ()), *pair) for pair in sides[: 1 + n % 3]] for n in (5, 1, 3, 2)]
    pairs = [pair for group in groups for pair in group]
    length_of = {row: len(row[0]) + 1 for row in answers_of(pairs)}

    def tokens(part):
        return len(answers_of(part)) * max(length_of[row] for row in answers_of(part))

    parts = micro_batches(groups, length_of, budget)
    assert sorted(map(id, (pair for part in parts for pair in part))) == sorted(map(id, pairs)), "each once"
    assert all(tokens(part) <= budget or len(part) == 1 for part in parts)
    for group in groups:
        assert tokens(group) > budget or any(all(pair in part for pair in group) for part in parts)
    if budget == 1000:
        assert parts == [pairs], "as they are"


def test_micro_batches_change_no_reward_model_but_in_the_order_of_sums():
    whole, cut = trained(steps=3), trained(steps=3, tokens=8)
    one, other = (margins(each.model, each.tokenizer, PAIRS).detach() for each in (whole, cut))
    assert torch.allclose(one, other, atol=1e-3) and float(one.abs().max()) > 0.01, "it has learned"
    assert not all(map(torch.equal, whole.model.parameters(), cut.model.parameters())), "they were cut"


def test_a_trained_reward_model_saved_and_loaded_again_rewards_exactly_alike(tmp_path):
    reward = trained()
    reward.calibrate(PROMPTS, ANSWERS)
    save_model(reward.model, reward.tokenizer, tmp_path / "reward_model")
    loaded = ModelReward(*load_reward_model(str(tmp_path / "reward_model"), TinyModelConfig(device=Device.cpu)))
    scores = reward(PROMPTS, ANSWERS)
    assert loaded(PROMPTS, ANSWERS) == scores and len(set(scores)) > 3
    assert (loaded.mean, loaded.std) == (reward.mean, reward.std) != (0.0, 1.0)


def test_a_calibrated_reward_model_scores_its_samples_with_mean_0_and_standard_deviation_1_and_within_10():
    reward = trained()
    raw = torch.tensor(reward(PROMPTS, ANSWERS))
    reward.calibrate(PROMPTS, ANSWERS)
    scores = torch.tensor(reward(PROMPTS, ANSWERS))
    assert abs(float(scores.mean())) < 1e-5 and float(scores.std()) == pytest.approx(1.0, abs=1e-4)
    assert torch.equal(raw.argsort(stable=True), scores.argsort(stable=True)), "their order stays"
    reward.std = 1e-6
    assert {abs(score) for score in reward(PROMPTS, ANSWERS)} == {10.0}


def test_centring_keeps_scores_around_zero_and_the_margins_right():
    sums = {}
    for centring in (0.0, 1.0):
        reward = trained(centring=centring)
        with torch.no_grad():
            chosen, rejected = pair_scores(reward.model, reward.tokenizer, PAIRS)
            assert torch.equal(margins(reward.model, reward.tokenizer, PAIRS), chosen - rejected)
        assert (chosen > rejected).all()
        sums[centring] = float((chosen + rejected).square().mean())
    assert sums[1.0] < sums[0.0] / 4


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_logs_each_parts_mean_and_the_errors_beside_the_total(compose_run, tmp_path, capsys):
    with Server().running() as server:
        parts = (
            "{gold: {kind: verifier, weight: 2.0}, long: {kind: function, function: graded:length, weight: 0.1}, "
            "even: {kind: function, function: graded:even_or_raise, weight: 0.5}, "
            f"asked: {{kind: http, url: {server.url}}}}}"
        )
        config = compose_run(*SMOKE, "reward=sum", f"reward.parts={parts}", "reward.max_failed=0.99")
        run(config, tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    for row in samples:
        length = len(row["answer"])
        expected = None if length % 2 or not length else 2.0 * row["gold"] + 0.1 * length + 0.5 + length
        assert row["reward"] == (None if expected is None else pytest.approx(expected))
    assert {row["reward"] is None for row in samples} == {True, False}, "else nothing was tried"
    for row in steps(tmp_path / "run"):
        assert {f"train/reward/{name}" for name in ("gold", "long", "even", "asked")} < set(row)
        assert row["train/reward/even"] == 1.0 and row["train/reward/gold"] == pytest.approx(row["train/gold"])
        assert 0 < row["train/reward_errors"] <= row["train/excluded"] < 32
    assert server.asked[0]["columns"].keys() == {"answer"}


def test_a_step_of_several_batches_adds_up_their_errors_and_averages_their_means(compose_run, tmp_path, capsys):
    outlets = Outlets([], tmp_path, Bars(True).stage("grpo", 1), Journal(tmp_path / "journal.jsonl"))
    record = Recorder(outlets, None, compose_run())
    record.rewarded(RewardReport({"right": 1.0, "rare": 3.0}, 2, "KeyError: [/topic]"))
    record.rewarded(RewardReport({"right": 0.0}, 1, "again"))
    expected = {"train/reward/right": 0.5, "train/reward/rare": 3.0, "train/reward_errors": 3.0}
    assert record._rewarded() == expected and record._rewarded() == {}, "the next step begins with nothing"
    said = capsys.readouterr().out
    assert said.startswith("warning: 2 sample(s) are left out") and "KeyError: [/topic]" in said and "again" not in said


def test_above_the_allowed_share_of_failures_the_run_stops_with_the_exception(compose_run, tmp_path):
    reward = ("reward=function", "reward.function=graded:even_or_raise", "reward.max_failed=0.0")
    with pytest.raises(
        RunError, match=r"of 32 samples have no .* at most 0% may .*even_or_raise raised ValueError: odd"
    ):
        run(compose_run(*SMOKE, *reward), tmp_path / "run")


def test_a_run_may_go_on_without_any_reward_where_that_is_allowed(compose_run, tmp_path):
    reward = ("reward=function", "reward.function=graded:raises", "reward.max_failed=1.0")
    run(compose_run(*SMOKE, *reward), tmp_path / "run")
    assert [row["train/reward_errors"] for row in steps(tmp_path / "run")] == [32.0] * 3


def test_a_reward_model_may_be_trained_as_part_of_a_sum_and_reports_accuracy_and_margin(compose_run, tmp_path):
    liked = "liked: {kind: model, steps: 20, prompts: 64, lr: 0.01, centring: 0.01}"
    parts = f"reward.parts={{{liked}, long: {{kind: function, function: graded:length, weight: 0.0}}}}"
    summary = run(compose_run(*SMOKE, "reward=sum", parts), tmp_path / "run")
    assert 0.0 <= summary["reward_model_accuracy"] <= 1.0 and summary["reward_model_margin"] != 0.0
    assert summary["reward_model_pairs"] > 10
    assert all(row["train/reward/liked"] == pytest.approx(row["train/reward"]) for row in steps(tmp_path / "run"))
    again = compose_run(*SMOKE, "reward=model", f"reward.path={tmp_path}/run/reward_model")
    run(again, tmp_path / "again")
    rewards = [
        [row["eval/reward"] for row in rows(tmp_path / name) if "eval/reward" in row] for name in ("run", "again")
    ]
    assert rewards[0][0] == rewards[1][0] != 0.0
