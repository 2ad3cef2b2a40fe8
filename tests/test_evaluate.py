"""Evaluation: pass@k against brute force, and a saved policy that is measured as its run has measured it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from composed import composed_evaluation, composed_run
from forked import LIGHT
from hydra.errors import CompactHydraException
from hypothesis import given
from hypothesis import strategies as st

from rlhf.assembly.saved_policy import evaluate_policy
from rlhf.held_out import pass_at_k, right
from rlhf.run import run

ROOT = Path(__file__).resolve().parent.parent
TASK = ("task=sort", "task.letters=3", "task.max_length=4", "task.held_out=16")


# --- pass@k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_that_hold_a_right_one(n):
    for c in range(n + 1):
        answers = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            drawn = list(combinations(answers, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, drawn)) / len(drawn), abs=1e-12)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_grows_with_k_and_with_right_answers_and_at_1_is_their_share(drawn):
    n, c, k = drawn
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)
    assert 0 <= pass_at_k(n, c, k) <= 1
    assert pass_at_k(n, c, k) >= pass_at_k(n, c, max(1, k - 1))
    assert pass_at_k(n, min(n, c + 1), k) >= pass_at_k(n, c, k)
    assert (pass_at_k(n, c, k) == 0) == (c == 0)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_refuses_numbers_that_cannot_be(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_an_answer_is_right_at_gold_score_1_alone_and_neither_where_there_is_none():
    assert right([1.0, 0.99, 0.0, None]) == [1.0, 0.0, 0.0, None]


# --- a saved policy ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run of a few steps that is right now and then."""

    folder = tmp_path_factory.mktemp("run")
    overrides = ["experiment=smoke", *TASK, "transfer=local", "logger=jsonl", "sft.steps=120", "steps=2", "seed=3"]
    run(composed_run(*overrides), folder, overrides)
    return folder


def evaluated(trained: Path, folder: Path, *overrides: str) -> dict:
    config = composed_evaluation(f"model.path={trained}/policy", *TASK, "seed=3", *overrides)
    numbers = evaluate_policy(config, folder)
    assert json.loads((folder / "evaluation.json").read_text()) == numbers
    return numbers


def test_a_saved_policy_is_as_good_as_its_run_has_said(trained, tmp_path, capsys):
    numbers = evaluated(trained, tmp_path, "evaluate.samples=4", "evaluate.k=[4,1,2]")
    summary = json.loads((trained / "summary.json").read_text())
    assert numbers["greedy_accuracy"] == summary["greedy_accuracy_end"]
    assert numbers["sampled_gold"] == pytest.approx(summary["gold_end"], abs=0.15)  # 64 samples, and the run's 16
    assert 0 < numbers["pass@1"] < numbers["pass@2"] < numbers["pass@4"] < 1
    assert (numbers["task"], numbers["prompts"], numbers["samples"]) == ("sort", 16, 4)
    screen = capsys.readouterr().out
    assert f"{numbers['pass@4']:.3f}" in screen and str(tmp_path / "evaluation.json") in screen


def test_the_same_evaluation_gives_the_same_numbers_and_another_temperature_others(trained, tmp_path):
    def numbers(name: str, *overrides: str) -> dict:
        measured = evaluated(trained, tmp_path / name, "evaluate.samples=4", "evaluate.k=[1]", *overrides)
        return {key: value for key, value in measured.items() if key not in ("seconds", "temperature")}

    first, again, cold = numbers("first"), numbers("again"), numbers("cold", "rollout.temperature=0.05")
    assert first == again
    assert cold["greedy_accuracy"] == first["greedy_accuracy"]
    assert cold["pass@1"] == pytest.approx(cold["greedy_accuracy"], abs=0.1)
    assert cold["sampled_gold"] != first["sampled_gold"]


@pytest.mark.parametrize("dial", ["rollout.top_k=1", "evaluate.top_k=1", "evaluate.min_p=1.0", "rollout.top_p=1e-6"])
def test_an_evaluation_samples_from_what_is_left_of_a_cut_distribution(trained, tmp_path, capsys, dial):
    numbers = evaluated(trained, tmp_path, "evaluate.samples=2", "evaluate.k=[1]", "evaluate.temperature=1.5", dial)
    name, value = dial.partition(".")[2].split("=")
    assert numbers["pass@1"] == numbers["greedy_accuracy"], "where the likeliest token alone is left"
    assert numbers[name] == float(value) and numbers["temperature"] == 1.5
    assert f"at temperature 1.5, {name} {float(value):g}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_worker_processes_give_the_numbers_of_one_process(trained, tmp_path):
    alone = evaluated(trained, tmp_path / "local")
    workers = evaluated(trained, tmp_path / "ipc", "transfer=ipc", "rollout.workers=2")
    assert {**alone, "seconds": 0} == {**workers, "seconds": 0}


def test_a_task_without_answers_is_refused(trained, tmp_path):
    config = composed_evaluation(
        f"model.path={trained}/policy", "task=jsonl", f"task.path={ROOT}/examples/preferences.jsonl"
    )
    with pytest.raises(ValueError, match=r"no held-out row of the task has an answer .* task\.path"):
        evaluate_policy(config, tmp_path)


def test_during_a_run_held_out_prompts_have_pass_at_k_and_the_first_sample_is_the_one_that_is_always_drawn(
    compose_run, tmp_path
):
    def rows(name: str, *overrides: str) -> list[dict]:
        config = compose_run("experiment=smoke", *TASK, "transfer=local", "logger=jsonl", "steps=2", *overrides)
        run(config, tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "eval/gold" in row]

    once, often = rows("once"), rows("often", "evaluate.samples=4", "evaluate.k=[4,1]")
    assert all({"eval/pass_at_1"} == {name for name in row if "pass" in name} for row in once)
    assert all(0 < row["eval/pass_at_1"] < row["eval/pass_at_4"] for row in often)
    assert [row["eval/greedy_accuracy"] for row in often] == [row["eval/greedy_accuracy"] for row in once]
    summary = json.loads((tmp_path / "often" / "summary.json").read_text())
    assert summary["pass_at_4_end"] == often[-1]["eval/pass_at_4"]


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "screen"),
    [
        ("--help", 0, "task             agent arithmetic environment given guess hf jsonl reasoning_gym reverse sort"),
        ("--help task=nothing", 1, "Could not find 'task/nothing'"),
        ("--cfg job", 0, "samples: 16"),
        ("", 1, "model.path has no value: add model.path=..."),
        pytest.param("model.path=x algo=dpo", 1, "Could not override 'algo'", marks=pytest.mark.slow),
        pytest.param(
            "model.path=x evaluate.samples=4",
            1,
            "evaluate.k must be at most evaluate.samples (4; got 8)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_does_not_evaluate_imports_nothing_heavy(tmp_path, arguments, code, screen):
    command = [sys.executable, "-m", "rlhf.evaluate", *arguments.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), LIGHT: "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, screen in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.k=[0]"], r"evaluate\.k must be at least 1 \(got 0\)"),
        (["evaluate.samples=0"], r"evaluate\.samples must be at least 1 \(got 0\)"),
        (["rollout.workers=2"], r"rollout\.workers must be 1 \(got 2\)"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_with_what_is_allowed(overrides, message):
    with pytest.raises(CompactHydraException, match=message):
        composed_evaluation("model.path=x", *overrides)
