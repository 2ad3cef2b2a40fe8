"""Alarms: each fires where it should, nowhere else, and says in one line what it saw and what to do."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
from composed import composed_run
from hydra.errors import CompactHydraException
from hypothesis import given
from hypothesis import strategies as st
from sizes import SEEDS

from rlhf.monitor.alarms import EVALUATIONS, JUMP_WINDOW, LASTING, OF_EVALUATIONS, OF_STEPS, QUIET, Watch
from rlhf.monitor.metrics import zero_std
from rlhf.run import run
from rlhf.shell.ending import RunError

HEALTHY = {
    "train/zero_std": 0.2,
    "train/grad_norm": 0.5,
    "train/skipped_updates": 0.0,
    "train/kl": 0.02,
    "train/entropy": 1.0,
    "train/truncated": 0.1,
    "train/tokens_per_row": 4.0,
    "train/mismatch": 1e-7,
    "train/ess": 0.99,
    "rollout/lag": 0.0,
}
STEPS = {  # name: (metric, the last value that is healthy, one that is not, what the line must name beside the number)
    "no_signal": ("train/zero_std", 0.9, 0.95, ["at most 0.9", "samples_per_prompt", "algo.dynamic_sampling"]),
    "gradient": ("train/grad_norm", 1e-9, 0.0, ["more than 0", "rollout.temperature"]),
    "nan": ("train/reward", -1e9, math.nan, ["train/reward", "finite", "optim.lr"]),
    "kl": ("train/kl", 1.0, 1.01, ["at most 1", "algo.kl_coef"]),
    "entropy": ("train/entropy", 0.1, 0.099, ["at least 10%", "algo.entropy_coef"]),
    "truncated": ("train/truncated", 0.5, 0.52, ["at most 0.5", "rollout.max_new_tokens (16)"]),
    "length": ("train/tokens_per_row", 12.0, 12.5, ["at most 3 times", "rollout.max_new_tokens, 16"]),
    "mismatch": ("train/mismatch", 0.1, 0.11, ["at most rollout.mismatch_alarm=0.1", "rollout.dtype"]),
    "ess": ("train/ess", 0.5, 0.49, ["at least 0.5", "below 0.5 for 5 steps", "rollout.dtype"]),
    "lag": ("rollout/lag", 1.5, 1.6, ["at most alarms.lag=1.5", "above 1.5 for 5 steps", "rollout.ahead.lag"]),
}
SET = {"lag": ["alarms.lag=1.5"]}  # what is off by default

WIDER = {
    **{"no_signal": 0.97, "kl": 2, "entropy": 0.05, "truncated": 0.6, "length": 3.5, "mismatch": 0.2, "ess": 0.4},
    "lag": 2,
}


@pytest.fixture
def watch(compose_run):
    """`watch(alarms, "alarms.kl=null", ...)` of the default run with these overrides."""

    def watching(alarms, *overrides: str) -> Watch:
        return Watch(alarms, compose_run("transfer=local", "rollout.max_new_tokens=16", *overrides))

    return watching


@pytest.fixture(scope="module")
def default_run():
    """The default run, composed once for all examples of a property."""
    return composed_run()


def step(**changes: float) -> dict[str, float]:
    return HEALTHY | {f"train/{name}": value for name, value in changes.items()}


def fired(watch: Watch, rows) -> dict[str, str]:
    for row in rows:
        watch(row)
    return watch.firing


def evaluations(rewards, golds) -> list[dict[str, float]]:
    return [
        {"step": 10.0 * index, "eval/reward": reward, "eval/gold": gold}
        for index, (reward, gold) in enumerate(zip(rewards, golds, strict=True))
    ]


# --- steps ------------------------------------------------------------------------------------------------------------


def test_every_alarm_of_steps_has_a_case_below():
    assert set(STEPS) == set(OF_STEPS)


@pytest.mark.parametrize("name", STEPS)
def test_an_alarm_fires_beyond_its_bound_alone_and_names_number_range_and_key(watch, name):
    metric, healthy, sick, words = STEPS[name]
    dials = SET.get(name, [])
    assert fired(watch(OF_STEPS, *dials), [HEALTHY] + [HEALTHY | {metric: healthy}] * LASTING) == {}
    said = fired(watch(OF_STEPS, *dials), [HEALTHY] + [HEALTHY | {metric: sick}] * LASTING)
    assert set(said) == {name}
    assert "\n" not in said[name] and "healthy" in said[name] and f"{sick:.3g}" in said[name]
    assert all(word in said[name] for word in words), said[name]


@pytest.mark.parametrize("name", STEPS)
def test_null_turns_an_alarm_off(watch, name):
    metric, _, sick, _ = STEPS[name]
    off = "rollout.mismatch_alarm=null" if name == "mismatch" else f"alarms.{name}=null"
    assert fired(watch(OF_STEPS, off), [HEALTHY] + [HEALTHY | {metric: sick}] * LASTING) == {}


@pytest.mark.parametrize("name", WIDER)
def test_a_bound_is_the_dial_of_that_name(watch, name):
    metric, _, sick, _ = STEPS[name]
    dial = "rollout.mismatch_alarm" if name == "mismatch" else f"alarms.{name}"
    assert fired(watch(OF_STEPS, f"{dial}={WIDER[name]}"), [HEALTHY] + [HEALTHY | {metric: sick}] * LASTING) == {}


@pytest.mark.parametrize("name", ["ess", "lag"])
def test_what_is_beyond_its_bound_in_fewer_steps_or_not_in_a_row_is_no_alarm(watch, name):
    metric, healthy, sick, _ = STEPS[name]
    few = [HEALTHY | {metric: sick}] * (LASTING - 1)
    for rows in (few, [HEALTHY, *few], [*few, HEALTHY | {metric: healthy}, *few]):
        assert fired(watch(OF_STEPS, *SET.get(name, [])), rows) == {}


def test_samples_that_older_weights_have_drawn_are_no_mismatch_but_may_count_too_little(watch):
    old = HEALTHY | {"rollout/lag": 1.0, "train/mismatch": 0.5, "train/ess": 0.3}
    said = fired(watch(OF_STEPS, "rollout.ahead.lag=1", "algo.correction=tis", "transfer=ipc"), [old] * LASTING)
    assert set(said) == {"ess"} and "lower rollout.ahead.lag (1) or optim.lr" in said["ess"]


def test_equal_rewards_are_no_alarm_for_an_algorithm_that_compares_no_samples(watch):
    assert fired(watch(OF_STEPS, "algo=ppo"), [step(zero_std=1.0)]) == {}


def test_a_skipped_update_is_an_alarm_and_not_a_zero_gradient(watch):
    said = fired(watch(OF_STEPS), [step(grad_norm=0.0, skipped_updates=1.0)])
    assert set(said) == {"gradient"} and "train/skipped_updates is 1" in said["gradient"]


def test_a_kl_far_above_its_median_is_an_alarm_once_there_are_enough_steps(watch):
    jump = step(kl=0.3)
    assert fired(watch(OF_STEPS), [step(kl=0.05)] * (JUMP_WINDOW - 1) + [jump]) == {}
    said = fired(watch(OF_STEPS), [step(kl=0.05)] * JUMP_WINDOW + [jump])
    assert set(said) == {"kl"} and "at most 5 times" in said["kl"]
    assert fired(watch(OF_STEPS, "alarms.kl_jump=null"), [step(kl=0.05)] * JUMP_WINDOW + [jump]) == {}
    assert fired(watch(OF_STEPS), [step(kl=0.002)] * JUMP_WINDOW + [step(kl=0.04)]) == {}, "both are next to nothing"


@given(rate=st.floats(1e-4, 0.011), steps=st.integers(1, 90))
def test_a_kl_that_grows_steadily_from_zero_is_no_alarm(default_run, rate, steps):
    assert fired(Watch(OF_STEPS, default_run), [step(kl=rate * index) for index in range(steps)]) == {}


def test_long_rows_are_no_alarm_far_from_the_limit(watch):
    rows = [HEALTHY, step(tokens_per_row=13.0)]
    assert set(fired(watch(OF_STEPS), rows)) == {"length"}
    assert fired(watch(OF_STEPS, "rollout.max_new_tokens=32"), rows) == {}


@given(st.sets(st.sampled_from(sorted(HEALTHY))))
def test_a_metric_that_is_not_measured_is_no_alarm(default_run, left_out):
    row = {name: value for name, value in HEALTHY.items() if name not in left_out}
    assert fired(Watch(OF_STEPS, default_run), [row] * (LASTING + 1)) == {}


def test_an_alarm_speaks_again_only_after_it_has_been_quiet_for_a_while(watch):
    listening = watch(OF_STEPS)
    calm, sick = 0.5, 1.5
    for values, expected in (
        ([calm, sick, sick, sick], [False, True, False, False]),
        ([calm] * (QUIET - 1) + [sick], [False] * QUIET),
        ([calm] * QUIET + [sick], [False] * QUIET + [True]),
    ):
        assert [bool(listening(step(kl=value))) for value in values] == expected
    assert set(listening.firing) == {"kl"}


# --- evaluations ------------------------------------------------------------------------------------------------------

RISING = [0.1 * index for index in range(EVALUATIONS + 1)]
FALLING = [0.8 - 0.05 * index for index in range(EVALUATIONS + 1)]


def test_a_reward_that_rises_while_gold_falls_is_an_alarm_that_names_golds_best_step(watch):
    rows = evaluations([-0.1, *RISING], [0.5, *FALLING])
    assert fired(watch(OF_EVALUATIONS), rows[:-1]) == {}, "too few evaluations after gold's best"
    said = fired(watch(OF_EVALUATIONS), rows)
    assert set(said) == {"overoptimisation"}
    for words in ("eval/reward has risen by 0.4", "eval/gold fallen by 0.2", "0.8 at step 10", "algo.kl_coef"):
        assert words in said["overoptimisation"], said
    assert fired(watch(OF_EVALUATIONS, "alarms.overoptimisation=null"), rows) == {}


@pytest.mark.parametrize(
    ("rewards", "golds"),
    [(RISING, RISING), (FALLING, FALLING), (FALLING, RISING), ([1.0] * 7, FALLING), (RISING, [0.8] * 7)],
    ids=["both rise", "both fall", "gold alone rises", "reward stays", "gold stays"],
)
def test_no_other_trend_is_over_optimisation(watch, rewards, golds):
    assert fired(watch(OF_EVALUATIONS), evaluations(rewards, golds)) == {}


def test_evaluations_without_gold_are_no_alarm(watch):
    rows = [{"step": float(index), "eval/reward": reward} for index, reward in enumerate(RISING)]
    assert fired(watch(OF_EVALUATIONS), rows) == {}


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10), swing=st.floats(0, 0.3))
def test_over_optimisation_does_not_depend_on_the_rewards_units(default_run, scale, shift, swing):
    golds = [gold + swing * (-1) ** index for index, gold in enumerate(FALLING)]
    plain, other = (
        fired(Watch(OF_EVALUATIONS, default_run), evaluations(rewards, golds))
        for rewards in (RISING, [shift + scale * reward for reward in RISING])
    )
    assert set(plain) == set(other)


def test_noise_alone_is_hardly_ever_over_optimisation(default_run):
    """Twelve evaluations, the reward rising, gold noise around one value; looked at after each."""
    alarms = 0
    for seed in range(300):
        draw = random.Random(seed)
        rows = evaluations(range(12), [draw.gauss(0.6, 0.03) for _ in range(12)])
        listening = Watch(OF_EVALUATIONS, default_run)
        alarms += any([listening(row) for row in rows])
    assert alarms / 300 < 0.08


def test_a_metric_of_an_evaluation_that_is_not_finite_is_an_alarm(watch):
    assert set(fired(watch(OF_EVALUATIONS), evaluations([math.inf], [0.5]))) == {"nan"}


# --- a run ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.sampled_from([None, 0.0, 1.0]), min_size=3, max_size=3), min_size=1, max_size=8))
def test_zero_std_is_the_share_of_prompts_without_two_different_rewards(groups):
    different = [any(a != b for a, b in itertools.product(g, g) if None not in (a, b)) for g in groups]
    assert zero_std([r for group in groups for r in group], 3) == pytest.approx(different.count(False) / len(groups))


def test_zero_std_is_not_measured_of_single_samples():
    assert zero_std([1.0, 0.0], 1) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alarms.no_signal=2", r"alarms\.no_signal must be between 0\.0 and 1\.0 \(got 2\.0\)"),
        ("alarms.gradient=-1", r"alarms\.gradient must be at least 0 \(got -1\.0\)"),
        ("alarms.kl=0", r"alarms\.kl must be greater than 0"),
        ("alarms.length=0.5", r"alarms\.length must be at least 1 \(got 0\.5\)"),
        ("alarms.ess=1.5", r"alarms\.ess must be between 0\.0 and 1\.0 \(got 1\.5\)"),
        ("alarms.lag=-1", r"alarms\.lag must be at least 0 \(got -1\.0\)"),
        ("+alarms.kll=1", r"'AlarmsConfig' object has no attribute 'kll'"),
    ],
)
def test_a_bound_that_makes_no_sense_is_named_with_what_is_allowed(compose_run, override, message):
    with pytest.raises((CompactHydraException, ValueError), match=message):
        compose_run(override)


@pytest.fixture
def indifferent(tmp_path, monkeypatch):
    """Overrides of a short run whose reward is the same for all answers."""
    (tmp_path / "indifferent.py").write_text(
        "def one(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    small = (
        "experiment=smoke",
        "steps=3",
        "sft.steps=4",
        "task.held_out=16",
        "task.prompts=64",
        "transfer=local",
        "algo.kl_coef=0",
    )
    return (*small, "reward=function", "reward.function=indifferent:one", "logger=[console,jsonl]")


def test_a_run_says_an_alarm_once_logs_it_each_step_and_lists_it_at_the_end(compose_run, tmp_path, capfd, indifferent):
    summary = run(compose_run(*indifferent), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    assert [row["alarm/no_signal"] for row in steps] == [row["train/zero_std"] for row in steps] == [1.0] * 3
    assert not any("alarm/kl" in row for row in rows)
    assert summary["alarm/no_signal"] == summary["alarm/gradient"] == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["alarm/no_signal"] == 1
    screen = capfd.readouterr().out
    assert screen.count("alarm no_signal, step 1: train/zero_std is 1") == screen.count("train/zero_std") == 1
    assert "alarm no_signal, first at step" in screen


def test_an_alarm_ends_the_run_where_it_is_told_to(compose_run, tmp_path, indifferent):
    with pytest.raises(RunError, match=r"alarm no_signal, step 1: .*alarms\.stop=true ends the run"):
        run(compose_run(*indifferent, "alarms.stop=true"), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["alarm/no_signal"] == 1.0 and rows[-1]["step"] == 1, "the step that it ended with is logged"


@pytest.mark.parametrize("seed", SEEDS)
def test_against_a_weak_reward_model_reward_and_kl_rise_while_gold_falls_and_the_alarm_says_so(
    compose_run, tmp_path, capfd, seed
):
    config = compose_run("experiment=overoptimisation", f"seed={seed}", "transfer=local", "logger=[console,jsonl]")
    summary = run(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    golds = [row["eval/gold"] for row in rows if "eval/gold" in row]
    kls = [row["train/kl"] for row in rows if "train/kl" in row]
    assert summary["reward_end"] > summary["reward_start"] + 0.5, "in standard deviations of the reward model's scores"
    assert golds[-1] < max(golds) - 0.2, golds
    assert kls[0] == pytest.approx(0, abs=1e-6) and sum(kls[-10:]) / 10 > 2 * sum(kls[:20]) / 20 > 0.1, kls
    assert 0 < summary["alarm/overoptimisation"] <= config.steps
    assert capfd.readouterr().out.count("eval/reward has risen") == 1
