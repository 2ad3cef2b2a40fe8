"""DPO: log-probs against brute force, gradients for any split, pairs from data or samples, and that it learns."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra.errors import CompactHydraException
from hypothesis import given
from hypothesis import strategies as st
from sizes import SEEDS

from rlhf.compose import misplaced
from rlhf.models.policy import make_policy
from rlhf.models.tokenizer import make_tokenizer
from rlhf.run import run
from rlhf.shell.ending import RunError
from rlhf.stages.dpo import DpoLearner, Preference, answer_logprobs, tokenised
from rlhf.types import Pair, Prompt

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ("experiment=smoke", "algo=dpo", "transfer=local", "logger=jsonl", "task.held_out=16", "evaluate_every=2")
LETTERS = "abcdefghi"
TEXTS = st.text(LETTERS, max_size=6)
PAIRS = [("ab", "abc", "a"), ("c", "", "cccc"), ("hgfe", "defgh", "hgfed"), ("ia", "ai", "i"), ("bb", "b", "bbb")]


@pytest.fixture
def make_learner(compose_run):
    """`make_learner("algo.beta=1", ...)`: a small policy with PAIRS to learn and the same held out."""

    def make(*overrides: str) -> DpoLearner:
        small = ("model.hidden=32", "model.heads=2", "model.intermediate=48", "model.layers=2", "model.context=16")
        config = compose_run("algo=dpo", *small, *overrides)
        tokenizer = make_tokenizer(config.model, LETTERS, chat=False)
        policy = make_policy(config.model, tokenizer, seed=1)
        pairs = made(tokenizer)
        return DpoLearner(policy, tokenizer, (pairs, pairs), config)

    return make


def made(tokenizer, rows=PAIRS) -> list[Pair]:
    return [Pair(Prompt(text, tuple(tokenizer.encode(text))), chosen, rejected) for text, chosen, rejected in rows]


def gradients(learner: DpoLearner) -> torch.Tensor:
    """All gradients of one step on all pairs, flat."""
    learner._over(learner.training, range(len(PAIRS)), gradients=True)
    return torch.cat([p.grad.flatten() for p in learner.policy.parameters() if p.grad is not None])


# --- learner ----------------------------------------------------------------------------------------------------------


def test_answers_have_the_log_probs_of_a_brute_force_loop_with_eos_and_at_temperature_1(make_learner):
    learner = make_learner("rollout.temperature=0.5")
    tokenizer = make_tokenizer(learner.config.model, LETTERS, chat=False)

    @given(st.lists(st.tuples(st.text(LETTERS, min_size=1, max_size=6), TEXTS, TEXTS), min_size=1, max_size=4))
    def check(rows):
        pairs = made(tokenizer, rows)
        with torch.no_grad():
            ours = answer_logprobs(learner.policy, tokenised(pairs, tokenizer, 16))
            for pair, of_pair in zip(pairs, ours, strict=True):
                for text, mine in zip((pair.chosen, pair.rejected), of_pair, strict=True):
                    answer = [*tokenizer.encode(text), tokenizer.eos_token_id]
                    logits = learner.policy(input_ids=torch.tensor([[*pair.prompt.ids, *answer]])).logits[0]
                    logits = logits[len(pair.prompt.ids) - 1 : -1]
                    expected = logits.log_softmax(-1)[range(len(answer)), answer].sum()
                    assert float(mine) == pytest.approx(float(expected), abs=1e-4)

    check()


def test_at_first_the_policy_is_its_reference(make_learner):
    learner = make_learner()
    before = learner.measure()
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["accuracy"] == 0.5
    assert [before[name] for name in ("margin", "chosen", "rejected")] == pytest.approx([0, 0, 0], abs=1e-5)


def test_the_loss_is_that_of_the_paper_after_steps(make_learner):
    learner = make_learner("algo.beta=0.3", "optim.lr=1e-3")
    reference = copy.deepcopy(learner.policy)
    for _ in range(3):
        learner.learn(range(len(PAIRS)))
    with torch.no_grad():
        rows = learner.training.rows
        ratio_N2 = answer_logprobs(learner.policy, rows) - answer_logprobs(reference, rows)
    margins = [0.3 * float(chosen - rejected) for chosen, rejected in ratio_N2]
    measured = learner.measure()
    assert measured["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / len(margins), abs=1e-5)
    assert measured["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert measured["margin"] == pytest.approx(measured["chosen"] - measured["rejected"], abs=1e-5)
    assert measured["accuracy"] == sum(m > 0 for m in margins) / len(margins)


@pytest.mark.parametrize("tokens", [1, 24, 40])
def test_gradients_are_the_same_for_any_split_into_microbatches(make_learner, tokens):
    whole, parts = make_learner(), make_learner(f"tokens_per_microbatch={tokens}")
    assert len(list(whole._parts(whole.training.rows, range(5)))) == 1
    assert len(list(parts._parts(parts.training.rows, range(5)))) > 1
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-4, atol=1e-7)
    assert parts.measure() == pytest.approx(whole.measure(), abs=1e-5)


def test_a_microbatch_holds_each_pair_once_in_order_and_no_more_tokens_than_allowed(make_learner):
    learner = make_learner()

    @given(lengths=st.lists(st.integers(1, 30), max_size=12), limit=st.integers(1, 200))
    def check(lengths, limit):
        learner.config.tokens_per_microbatch = limit
        rows = [Preference((0,), [0] * length, [0]) for length in lengths]
        parts = list(learner._parts(rows, range(len(rows))))
        assert [row for part in parts for row in part] == list(range(len(rows)))
        assert all(len(part) == 1 or 2 * len(part) * max(rows[r].length for r in part) <= limit for part in parts)
        for part, after in pairwise(parts):
            assert 2 * (len(part) + 1) * max(rows[r].length for r in [*part, after[0]]) > limit

    check()


def test_steps_on_the_pairs_teach_them(make_learner):
    learner = make_learner("optim.lr=1e-3")
    losses = [learner.learn(range(len(PAIRS)))["loss"] for _ in range(20)]
    after = learner.measure()
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.55
    assert after["accuracy"] == 1.0 and after["margin"] > 0.3


def test_the_rate_follows_the_schedule(make_learner):
    learner = make_learner("optim.lr=1e-3", "optim.schedule=linear", "steps=4")
    assert [learner.learn([0])["lr"] for _ in range(4)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_steps_without_finite_gradients_leave_the_weights_alone_and_the_third_in_a_row_ends_the_run(make_learner):
    learner = make_learner()
    before = copy.deepcopy(learner.weights())
    learner.training.ref_N2[0, 0] = float("nan")
    for _ in range(2):
        assert learner.learn([0, 1])["skipped_updates"] == 1.0
    with pytest.raises(RunError, match=r"not finite in 3 steps in a row .* lower optim\.lr \(0\.0004\)"):
        learner.learn([0, 1])
    assert all(torch.equal(value, before[name]) for name, value in learner.weights().items())
    assert make_learner().learn([1])["skipped_updates"] == 0.0


def test_a_pair_that_is_longer_than_the_models_context_is_refused(make_learner):
    tokenizer = make_tokenizer(make_learner().config.model, LETTERS, chat=False)
    with pytest.raises(ValueError, match=r"pair has 17 tokens, and the model's context is 16: .* task\.path"):
        tokenised(made(tokenizer, [("ab", "a" * 14, "b")]), tokenizer, 16)
    assert len(tokenised(made(tokenizer, [("ab", "a" * 13, "b")]), tokenizer, 16)) == 1


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(compose_run, tmp_path):
    """`train("algo=dpo", ..., name="a")` runs in this process; the folder."""

    def trained(*overrides: str, name: str = "run") -> Path:
        run(compose_run(*overrides), tmp_path / name, overrides)
        return tmp_path / name

    return trained


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> list[dict[str, float]]:
    """All metrics but those that say how long things took."""
    measured = ("seconds/", "tokens_per_second")
    return [{name: value for name, value in row.items() if not name.startswith(measured)} for row in rows(folder)]


def test_a_run_on_sampled_pairs_says_loss_accuracy_and_margin_on_training_and_held_out_pairs(train, drawn):
    folder = train(*SMOKE, "steps=5")
    steps = [row for row in rows(folder) if "train/loss" in row]
    evaluations = [row for row in rows(folder) if "eval/pair_loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert all({"train/accuracy", "train/margin"} < set(row) and row["train/grad_norm"] > 0 for row in steps)
    assert [row["step"] for row in evaluations] == [0, 2, 4, 5]
    kept = {"eval/pair_accuracy", "eval/pair_margin", "eval/gold", "eval/reward", "eval/greedy_accuracy"}
    assert all(kept < set(row) and row["eval/gold"] == row["eval/reward"] for row in evaluations)
    assert evaluations[0]["eval/pair_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert evaluations[1]["eval/pair_loss"] != evaluations[0]["eval/pair_loss"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["pairs"] == 5 * 8 and summary["pair_accuracy_start"] == 0.5
    assert (folder / "policy" / "model.safetensors").exists() and (folder / "curves.png").exists()


def test_a_run_on_a_files_pairs_needs_no_gold_score(compose_run, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = tmp_path_factory.mktemp("run")  # its journal has no samples that were learned from
    task = ("task=jsonl", "task.path=examples/preferences.jsonl", "task.held_out=8", "rollout.max_new_tokens=8")
    run(compose_run(*SMOKE[:-2], *task, "steps=2", "evaluate_every=2"), folder)
    last = rows(folder)[-1]
    assert last["step"] == 2 and "eval/pair_loss" in last and "eval/gold" not in last


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ipc", "ipc transfer.staging=live transfer.take=view", "disk rollout.workers=2"])
def test_the_numbers_do_not_depend_on_how_the_weights_move(train, way):
    reference = train(*SMOKE, name="local")
    folder = train(*SMOKE, *f"transfer={way}".split())
    for row, expected in zip(numbers(folder), numbers(reference), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_it_learns(train, seed):
    dials = ("algo.beta=0.5", "optim.schedule=linear", "task.held_out=512", "transfer=local", "logger=jsonl")
    summary = json.loads((train("algo=dpo", *dials, f"seed={seed}") / "summary.json").read_text())
    assert summary["gold_end"] >= summary["gold_start"] + 0.05  # 512 samples: a standard error of about 0.013
    assert summary["pair_accuracy_end"] > 0.7


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo.beta=0"], r"algo\.beta must be greater than 0 \(got 0\.0\)"),
        (["algo.prompts=0"], r"algo\.prompts must be at least 1 \(got 0\)"),
        (["algo.label_noise=0.6"], r"algo\.label_noise must be between 0\.0 and 0\.5 \(got 0\.6\)"),
        (["algo.held_out=1"], r"algo\.held_out must be between 0\.0 and 0\.9 \(got 1\.0\)"),
        (["updates_per_step=2"], r"one optimiser step on a step's pairs: updates_per_step must be 1 \(got 2\)"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_with_what_is_allowed(compose_run, overrides, message):
    with pytest.raises(CompactHydraException, match=message):
        compose_run("algo=dpo", *overrides)


def test_dials_of_rl_do_not_exist_in_dpo_nor_its_own_in_rl():
    assert misplaced(["algo.beta=1"]) == ["that key belongs to the dpo algo: algo.beta needs algo=dpo"]
    (hint,) = misplaced(["algo=dpo", "algo.clip_low=0.1"])
    assert hint.startswith("that key belongs to the cispo or dapo or ")
    assert hint.endswith("algo.clip_low needs algo=cispo")
    assert {"base", "dpo"}.isdisjoint(hint.replace(":", "").split())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["samples_per_prompt=1"], r"samples_per_prompt must be at least 2 \(got 1\)"),
        (["algo.prompts=1"], r"prompts_per_step=8 pairs, and there are \d+ to train on: .* raise algo\.prompts"),
        (["task=jsonl", "task.path={texts}", "sft.steps=0"], r"algo=dpo needs chosen/rejected rows, or answers"),
    ],
)
def test_data_that_give_no_pairs_are_refused_with_what_to_change(train, tmp_path, overrides, message):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"prompt": f"say {number}"}) + "\n" for number in range(40)))
    with pytest.raises(ValueError, match=message):
        train(*SMOKE, "algo.label_noise=0", *[override.format(texts=texts) for override in overrides])


def test_the_reward_is_the_gold_score_unless_another_is_chosen(compose_run):
    assert type(compose_run("algo=dpo").reward).__name__ == "VerifierRewardConfig"
    assert type(compose_run("algo=dpo", "reward=model").reward).__name__ == "ModelRewardConfig"
    assert type(compose_run("algo=grpo").reward).__name__ == "ModelRewardConfig"
