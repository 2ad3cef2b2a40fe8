"""Rewards as people write them: every kind of number, every form of call, asynchronous ones, and what is no reward."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from rlhf.config import FunctionRewardConfig
from rlhf.rewards import FunctionReward, VerifierReward, WeightedSum, in_time, rewarded, usable
from rlhf.rewards.several import SeveralFunctions, functions_of
from rlhf.run import run
from rlhf.shell.ending import RunError
from rlhf.types import Completion, Prompt, RewardReport, Rollouts

MODULE = """
import asyncio, threading, time
from decimal import Decimal
from functools import partial

import numpy as np
import torch

calls, there = [], threading.Event()
answer = None

def gives(prompts, completions, **columns):
    return answer(len(completions)) if callable(answer) else answer

def lengths(completions, **columns):
    calls.append(columns)
    return [float(len(text)) for text in completions]

def contents(completions, **columns):
    calls.append((completions, columns))
    return [float(len(messages[0]["content"])) for messages in completions]

def ids(prompts, completions, completion_ids, **columns):
    calls.append((prompts, completions, completion_ids, columns))
    return [float(sum(row)) for row in completion_ids]

def ours(questions, replies, answer):
    calls.append((questions, replies, answer))
    return [1.0] * len(replies)

def named(prompts, completions, **columns):
    calls.append((prompts, completions, columns))
    return [1.0] * len(completions)

def asks_for_messages(prompts, completions, **columns):
    return [float(len(messages[0]["content"])) for messages in completions]

def asks_for_texts(completions, **columns):
    return [float(len(text.strip())) for text in completions]

def refuses(prompts, completions, **columns):
    raise LookupError("never")

def only_new(completions, trainer_state, **columns):
    return [1.0] * len(completions)

def nan_of_bb(prompts, completions, **columns):
    return [float("nan") if text == "bb" else float(len(text)) for text in completions]

def nan_of_long(prompts, completions, **columns):
    return np.array([np.inf if len(text) > 1 else 1.0 for text in completions])

async def later(prompts, completions, **columns):
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]

async def all_five(prompts, completions, **columns):
    calls.append(threading.current_thread().name)
    while len(calls) < 5:
        await asyncio.sleep(0.01)
    there.set()
    return [float(len(text)) for text in completions]

def beside(prompts, completions, **columns):
    return [float(there.wait(30))] * len(completions)

async def odd_raises(prompts, completions, **columns):
    calls.append(len(completions))
    if len(completions) == 1:  # not before all are asked
        while calls.count(1) < 4:
            await asyncio.sleep(0.01)
    if any(len(text) % 2 for text in completions):
        raise ValueError("odd")
    return [2.0] * len(completions)

async def never(prompts, completions, **columns):
    await asyncio.sleep(60)

def hangs_on_bb(prompts, completions, **columns):
    calls.append(threading.current_thread())
    if "bb" in completions:
        while True:
            time.sleep(0.01)
    return [1.0] * len(completions)

def sleeps(completions, **columns):
    calls.append(threading.current_thread())
    time.sleep(30)

def swallows(completions, **columns):
    rewards = []
    for text in completions:
        try:
            while text:
                pass
        except Exception:
            pass
        rewards.append(0.0)
    return rewards

def nothing(completions, **columns):
    return None

def only_even(completions, **columns):
    return [None if len(text) % 2 else 1.0 for text in completions]

def only_odd(completions, **columns):
    return [10.0 if len(text) == 1 else None for text in completions]

class Scale:
    def __init__(self, factor=3.0):
        self.factor = factor

    def __call__(self, completions, **columns):
        return [self.factor * len(text) for text in completions]

scaled, twice = Scale(2.0), partial(Scale(1.0), extra=None)

class Judge:
    async def __call__(self, prompts, completions, **columns):
        return [float(len(text)) for text in completions]

judge, bound = Judge(), partial(later)
"""

APART = """
import os, re, signal

def holds_the_lock(completions, **columns):
    if "bb" in completions:
        re.match("(a+)+$", "a" * 60 + "b")
    return [float(len(text)) for text in completions]

def alarmed(completions, **columns):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return [1.0] * len(completions)

def dies(completions, **columns):
    os._exit(3)

def refuses(prompts, completions, **columns):
    raise LookupError("never")

async def later(prompts, completions, **columns):
    return [float(len(text)) for text in completions]
"""

PROMPTS = [Prompt(f"{n}?", (n,), {"answer": n}) for n in range(4)]
ANSWERS = ["", "a", "bb", "ccc"]
CHAT = [Prompt("<|user|>Hi<|assistant|>", (1, 2), {}, ({"role": "user", "content": "Hi"},))] * 2


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """The module `mine` on the path."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "apart.py").write_text(APART)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("mine", "apart"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    import mine

    return mine


def rollouts(prompts: list[Prompt], texts: list[str], sampled: list[int] | None = None) -> Rollouts:
    """One sample a prompt, whose ids are 5, 6, ..."""
    rows = [
        Completion(range(5, 5 + max(1, len(text))), None, [0] * max(1, len(text)), "stop", sampled) for text in texts
    ]
    return Rollouts(prompts, rows, texts, list(range(len(prompts))), 1)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        [1, 0.5, True, None],
        (np.float32(1), np.float64(0.5), np.bool_(True), None),
        [torch.tensor(1.0), torch.tensor([0.5]), torch.tensor(True), None],
        [np.array(1), np.array([[0.5]]), np.int64(1), float("nan")],
        [Decimal(1), Decimal("0.5"), torch.tensor(1.0, requires_grad=True), Decimal("nan")],
        np.array([1, 0.5, 1, np.nan]),
        np.array([[1], [0.5], [1], [-np.inf]], dtype=np.float32),
        torch.tensor([1, 0.5, 1, math.inf], dtype=torch.bfloat16),
        torch.tensor([[1], [0.5], [1], [math.nan]], requires_grad=True),
        np.array([1, 0.5, True, None], dtype=object),
    ],
)
def test_numbers_of_every_kind_are_rewards_and_what_is_not_finite_is_none(mine, given):
    mine.answer = given
    rewards = FunctionReward("mine:gives")(PROMPTS, ANSWERS)
    assert rewards == [1.0, 0.5, 1.0, None] and {type(reward) for reward in rewards} == {float, type(None)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda n: 1.0, r"must return a list of 1 numbers or None \(got float\)"),
        (lambda n: "1", r"\(got str\)"),
        (lambda n: {"reward": 1.0}, r"\(got dict\)"),
        (lambda n: torch.tensor(1.0), r"\(got Tensor\)"),
        (lambda n: [1.0] * (n + 1), r"\(got 2 values\)"),
        (lambda n: np.zeros((2, n)), r"\(got 2 values\)"),
        (lambda n: ["1"] * n, r"must return finite numbers or None \(got '1'\)"),
        (lambda n: [1j] * n, r"\(got 1j\)"),
        (lambda n: [[1.0, 2.0]] * n, r"\(got \[1\.0, 2\.0\]\)"),
        (lambda n: np.zeros((n, 2)), r"\(got array\(\[0\., 0\.\]\)\)"),
        (lambda n: [10**400] * n, r"\(got <an integer of 1329 bits>\)"),
    ],
)
def test_what_is_no_reward_is_told_by_a_trial_on_one_row_before_anything_starts(mine, given, message):
    mine.answer = given
    with pytest.raises(ValueError, match=rf"^reward\.function=mine:gives .*{message}"):
        FunctionReward("mine:gives").check(PROMPTS)


def test_a_reward_that_is_not_finite_leaves_its_sample_out_and_is_counted():
    reward = FunctionReward("mine:nan_of_bb")
    assert reward(PROMPTS, ANSWERS) == [0.0, 1.0, None, 3.0]
    assert reward.report.counts == {"not_finite": 1} and reward.report.errors == 0
    assert reward(PROMPTS[:1], ["a"]) == [1.0] and reward.report.counts == {}


def test_more_nan_than_may_be_stops_the_run_with_the_function_and_what_it_gave():
    reward = WeightedSum({"long": (1.0, FunctionReward("mine:nan_of_long"))})
    reason = r"reward\.parts\.long\.function=mine:nan_of_long has given inf, which is NaN or infinite and no reward"
    with pytest.raises(RunError, match=rf"^2 of 4 samples have no reward .* at most 25% may .*: {reason}$"):
        usable(reward(PROMPTS, ANSWERS), 0.25, reward.report.error)


def test_in_a_sum_what_is_not_finite_in_a_part_is_none_of_the_sum_and_in_no_mean():
    parts = {
        "one": (1.0, FunctionReward("mine:nan_of_bb")),
        "two": (2.0, FunctionReward("mine:nan_of_long")),
        "far": (1e308, lambda prompts, answers: [0.0, 0.0, 0.0, 10.0]),
    }
    total = WeightedSum(parts)
    assert total(PROMPTS, ANSWERS) == [2.0, 3.0, None, None]
    assert total.report.counts == {"not_finite": 1 + 2}, "of the two parts; what they left out is in no sum"
    assert total.report.means == {"one": pytest.approx(4 / 3), "two": 1.0, "far": 2.5}
    assert WeightedSum({"far": parts["far"]})(PROMPTS, ANSWERS) == [0.0, 0.0, 0.0, None]


def test_a_tasks_score_that_is_not_finite_is_no_reward():
    class Task:
        def score(self, prompt: Prompt, answer: str) -> float:
            return math.nan if answer == "bb" else 1.0

    reward = VerifierReward(Task())
    assert reward(PROMPTS, ANSWERS) == [1.0, 1.0, None, 1.0] and reward.report.counts == {"not_finite": 1}


# --- forms of the call ------------------------------------------------------------------------------------------------


def test_ours_gets_prompts_and_completions_by_position_and_the_columns_by_name(mine):
    reward = FunctionReward("mine:ours")
    reward.check(PROMPTS)
    mine.calls.clear()
    assert rewarded(reward, rollouts(PROMPTS, ANSWERS)) == [1.0] * 4
    assert mine.calls == [(["0?", "1?", "2?", "3?"], ANSWERS, [0, 1, 2, 3])]
    named = FunctionReward("mine:named")
    mine.calls.clear()
    named(PROMPTS[:1], ["x"])
    assert mine.calls == [(["0?"], ["x"], {"answer": [0]})], "and nothing else among the columns"


def test_trls_form_with_completions_alone_finds_the_rest_among_the_columns(mine):
    reward = FunctionReward("mine:lengths")
    reward.check(PROMPTS)
    mine.calls.clear()
    assert rewarded(reward, rollouts(PROMPTS, ANSWERS)) == [0.0, 1.0, 2.0, 3.0]
    ids = [[5], [5], [5, 6], [5, 6, 7]]
    assert mine.calls == [{"answer": [0, 1, 2, 3], "prompts": ["0?", "1?", "2?", "3?"], "completion_ids": ids}]


def test_trls_form_with_completion_ids_gets_those_that_were_sampled(mine):
    reward = FunctionReward("mine:ids")
    reward.check(PROMPTS)
    mine.calls.clear()
    assert rewarded(reward, rollouts(PROMPTS, ANSWERS)) == [5.0, 5.0, 11.0, 18.0]
    assert mine.calls == [(["0?", "1?", "2?", "3?"], ANSWERS, [[5], [5], [5, 6], [5, 6, 7]], {"answer": [0, 1, 2, 3]})]
    assert rewarded(reward, rollouts(PROMPTS[:1], ["abcde"], [1, 0, 0, 1, 1])) == [8.0 + 9.0], "of the last answer"
    assert rewarded(WeightedSum({"a": (2.0, reward)}), rollouts(PROMPTS, ANSWERS)) == [10.0, 10.0, 22.0, 36.0]


def test_where_the_data_are_messages_trls_forms_get_messages_and_ours_gets_texts(mine):
    FunctionReward("mine:contents").check(CHAT, "yes")
    mine.calls.clear()
    assert rewarded(FunctionReward("mine:contents"), rollouts(CHAT, ["yes", "no"])) == [3.0, 2.0]
    completions, columns = mine.calls[0]
    assert completions == [[{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]]
    assert columns["prompts"] == [[{"role": "user", "content": "Hi"}]] * 2
    mine.calls.clear()
    FunctionReward("mine:named")(CHAT, ["yes", "no"])
    FunctionReward("mine:named", messages=True)(CHAT, ["yes", "no"])
    FunctionReward("mine:ids", messages=False).check(CHAT, "yes")
    assert mine.calls[0] == (["<|user|>Hi<|assistant|>"] * 2, ["yes", "no"], {})
    assert mine.calls[1] == (columns["prompts"], completions, {})
    assert mine.calls[2] == (["<|user|>Hi<|assistant|>"], ["yes"], [[1, 2]], {})


@pytest.mark.parametrize(
    ("function", "given", "key"),
    [
        ("asks_for_messages", r"TypeError: string indices .*: it was given texts, and takes messages", "true"),
        ("asks_for_texts", r"AttributeError: 'list' object .*: it was given messages, and takes texts", "false"),
    ],
)
def test_a_function_that_takes_the_other_form_of_conversations_is_told_the_key(mine, function, given, key):
    with pytest.raises(
        ValueError, match=rf"^reward.function=mine:{function} raised {given}: set reward.messages={key}$"
    ):
        FunctionReward(f"mine:{function}").check(CHAT, "yes")
    FunctionReward(f"mine:{function}", messages=key == "true").check(CHAT, "yes")
    FunctionReward(f"mine:{function}", messages=key != "true").check(CHAT, "yes")  # who says so is believed


def test_a_function_that_raises_on_either_form_of_conversations_costs_samples_only(mine):
    reward = FunctionReward("mine:refuses")
    reward.check(CHAT, "yes")
    assert reward(CHAT, ["yes", "no"]) == [None, None] and reward.report.errors == 2


@pytest.mark.parametrize(
    ("function", "columns", "message"),
    [
        (
            "ours",
            {},
            r"called as \(prompts, completions, \*\*columns\), and the task's columns are none: missing .*'an",
        ),
        ("only_new", {}, r"called as \(prompts, completions, completion_ids, \*\*columns\).*missing .*'trainer_state'"),
        (
            "lengths",
            {"prompts": 1},
            r".*columns are prompts: multiple values for argument 'prompts'; .*rename the column",
        ),
    ],
)
def test_a_function_that_does_not_take_what_it_is_given_is_told_before_it_is_called(mine, function, columns, message):
    with pytest.raises(ValueError, match=rf"^reward\.function=mine:{function} is {message}"):
        FunctionReward(f"mine:{function}").check([Prompt("?", (1,), columns)])
    assert mine.calls == []


@pytest.mark.parametrize("key", ["messages: maybe", "timeout_s: 0"])
def test_dials_that_make_no_sense_are_refused(key):
    name, _, value = key.partition(": ")
    with pytest.raises(ValueError, match=rf"^reward\.{name} must be .*\(got "):
        FunctionRewardConfig(function="mine:named", **{name: float(value) if value.isdigit() else value})


@pytest.mark.parametrize(("function", "factor"), [("scaled", 2.0), ("Scale", 3.0), ("twice", 1.0)])
def test_objects_classes_and_partial_functions_are_functions(mine, function, factor):
    reward = FunctionReward(f"mine:{function}")
    reward.check(PROMPTS)
    assert reward(PROMPTS, ANSWERS) == [factor * n for n in range(4)]


def test_a_function_may_return_none_for_all_its_samples(mine):
    reward = FunctionReward("mine:nothing")
    reward.check(PROMPTS)
    assert reward(PROMPTS, ANSWERS) == [None] * 4 and reward.report == RewardReport(errors=0)


def test_what_is_no_number_costs_its_sample_alone_once_a_run_goes_on(mine):
    mine.answer = [1.0, "2", 10**400, [1.0, 2.0]]
    reward = FunctionReward("mine:gives")
    assert reward(PROMPTS, ANSWERS) == [1.0, None, None, None]
    assert reward.report.counts == {"not_a_number": 3} and "must return finite numbers" in reward.report.error


# --- lists of functions, as trl's reward_funcs ------------------------------------------------------------------------


def several(*functions: str, **dials: object) -> SeveralFunctions:
    config = FunctionRewardConfig(function=[f"mine:{each}" for each in functions], **dials)
    reward = functions_of(config)
    assert isinstance(reward, SeveralFunctions)
    return reward


def test_of_a_list_of_functions_those_that_return_none_of_a_sample_add_nothing(mine):
    reward = several("only_even", "only_odd", "nothing", weights=[2.0, 0.5, 1.0])
    reward.check(PROMPTS)
    assert reward(PROMPTS, ANSWERS) == [2.0, 5.0, 2.0, None], "of the last, all say None"
    assert reward.report.means == {"only_even": 1.0, "only_odd": 10.0} and reward.report.errors == 0


def test_a_list_of_functions_may_be_a_part_of_a_sum(compose_run, mine):
    parts = (
        "reward.parts={a: {kind: function, function: [mine:only_even, mine:only_odd], weights: [2, 0.5], weight: 3}}"
    )
    part = compose_run("reward=sum", parts).reward.weighted()["a"]
    assert (part.weight, part.reward.function, part.reward.weights) == (
        3.0,
        ["mine:only_even", "mine:only_odd"],
        [2.0, 0.5],
    )
    assert WeightedSum({"a": (3.0, functions_of(part.reward))})(PROMPTS, ANSWERS) == [6.0, 15.0, 6.0, None]


def test_of_a_list_of_functions_one_that_fails_on_a_sample_leaves_it_out(mine):
    reward = several("later", "nan_of_bb", "odd_raises")
    assert reward(PROMPTS, ANSWERS) == [0.0 + 0.0 + 2.0, None, None, None]
    assert reward.report.counts == {"not_finite": 1, "raised": 2} and reward.report.errors == 2


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"function": ["a:b", "a"]}, r"^reward\.function must be like package\.module:name \(got 'a'\)"),
        ({"function": []}, r"^reward\.function must be like package\.module:name \(got \[\]\)"),
        ({"function": ["a:b", "a:b"]}, r"^reward\.function has a function twice"),
        ({"function": ["a:b"], "weights": [1.0, 2.0]}, r"^reward\.weights must have a number for each function"),
        ({"function": "a:b", "weights": [1.0]}, r"^reward\.weights must have a number for each function of a list"),
        ({"function": ["a:b"], "weights": [math.nan]}, r"^reward\.weights must be finite numbers"),
    ],
)
def test_a_list_of_functions_that_makes_no_sense_is_refused(dials, message):
    with pytest.raises(ValueError, match=message):
        FunctionRewardConfig(**dials)


# --- functions that hang ----------------------------------------------------------------------------------------------


def by(thread: str, reward: FunctionReward) -> list[float | None]:
    """The rewards, asked for in the main thread, or in another."""
    if thread == "main":
        return reward(PROMPTS, ANSWERS)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(reward, PROMPTS, ANSWERS).result(60)


@pytest.mark.parametrize("function", ["hangs_on_bb", "sleeps", "swallows"])
@pytest.mark.parametrize("thread", ["main", "another"])
def test_a_function_that_hangs_is_left_at_its_deadline_and_its_samples_have_no_reward(mine, function, thread):
    reward, began = FunctionReward(f"mine:{function}", timeout_s=0.3), time.monotonic()
    assert by(thread, reward) == [None] * 4 and time.monotonic() - began < 20
    assert reward.report.counts == {"timed_out": 4} and reward.report.errors == 4
    assert reward.report.error.endswith("has not answered within reward.timeout_s=0.3 seconds: raise it")


def test_a_function_is_called_in_the_main_thread_where_that_asks_and_nothing_of_a_late_call_is_left(mine):
    reward = FunctionReward("mine:hangs_on_bb", timeout_s=0.3)
    before = threading.active_count()
    assert reward(PROMPTS, ANSWERS) == [None] * 4 and reward(PROMPTS[:2], ANSWERS[:2]) == [1.0, 1.0]
    assert set(mine.calls) == {threading.main_thread()}
    until = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_calls_that_nothing_ends_end_the_run_before_they_are_too_many(mine, monkeypatch):
    monkeypatch.setattr(in_time, "_left", [])
    monkeypatch.setattr(in_time, "MOST_LEFT", 2)
    reward = FunctionReward("mine:sleeps", timeout_s=0.05)
    assert [by("another", reward), by("another", reward)] == [[None] * 4] * 2
    with pytest.raises(RunError, match=r"^2 calls of the reward's function hang, .*reward\.process=true"):
        by("another", reward)


@pytest.mark.slow
def test_in_a_process_of_its_own_whatever_hangs_is_killed_and_the_next_call_has_another(mine):
    reward = FunctionReward("apart:holds_the_lock", timeout_s=1.0, process=True)
    try:
        assert reward(PROMPTS[:2], ANSWERS[:2]) == [0.0, 1.0]
        assert reward(PROMPTS, ANSWERS) == [None] * 4 and reward.report.counts == {"timed_out": 4}
        assert reward(PROMPTS[3:], ANSWERS[3:]) == [3.0]
    finally:
        reward.close()


@pytest.mark.slow
def test_a_runs_processes_end_with_it(compose_run, tmp_path, mine):
    before = {child.pid for child in psutil.Process().children()}
    parts = "reward.parts={a: {kind: function, function: apart:holds_the_lock, process: true}, b: {kind: math}}"
    data = "\n".join(json.dumps({"prompt": f"{n}=", "answer": str(n)}) for n in range(8))
    (tmp_path / "rows.jsonl").write_text(data)
    rows = (
        "task=jsonl",
        f"task.path={tmp_path}/rows.jsonl",
        "task.held_out=2",
        "prompts_per_step=4",
        "evaluate_every=2",
    )
    run(compose_run(*SMOKE, *rows, "reward=sum", parts), tmp_path / "run")
    assert {child.pid for child in psutil.Process().children()} == before
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("train/reward/a" in row and "train/reward/b" in row for row in told if "train/loss" in row)


def test_a_process_that_ends_itself_costs_its_samples_and_is_said(mine):
    reward = FunctionReward("apart:dies", process=True)
    assert reward(PROMPTS[:1], ANSWERS[:1]) == [None] and reward.report.counts == {"raised": 1}
    assert reward.report.error.endswith("its process has ended: it crashed, or wanted too much memory")


@pytest.mark.slow
def test_in_a_process_of_its_own_functions_raise_and_await_as_elsewhere_and_may_use_sigalrm(mine):
    raising, later, alarmed = (
        FunctionReward(f"apart:{name}", process=True) for name in ("refuses", "later", "alarmed")
    )
    try:
        assert raising(PROMPTS[:2], ANSWERS[:2]) == [None, None] and raising.report.counts == {"raised": 2}
        assert "raised LookupError: never (" in raising.report.error and "apart.py:" in raising.report.error
        assert later(PROMPTS, ANSWERS) == [0.0, 1.0, 2.0, 3.0]
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(FunctionReward("apart:alarmed").check, PROMPTS)
            with pytest.raises(ValueError, match=r"signal only works in main thread .*: set reward\.process=true"):
                told.result(60)
            pool.submit(alarmed.check, PROMPTS).result(60)
    finally:
        for reward in (raising, later, alarmed):
            reward.close()


# --- asynchronous functions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["later", "judge", "bound"])
def test_an_asynchronous_function_is_awaited(mine, function):
    assert FunctionReward(f"mine:{function}")(PROMPTS, ANSWERS) == [0.0, 1.0, 2.0, 3.0]


def test_the_parts_of_a_sum_that_are_asynchronous_run_beside_each_other_and_beside_the_others(mine):
    parts = {name: (1.0, FunctionReward("mine:all_five", timeout_s=30)) for name in "abcde"}
    total = WeightedSum({"slow": (1.0, FunctionReward("mine:beside")), **parts})
    assert total(PROMPTS, ANSWERS) == [1.0, 6.0, 11.0, 16.0], "each waits for all others"
    assert len(mine.calls) == 5 and len(set(mine.calls)) == 1, "in one loop, so that a client may be kept"


def test_an_asynchronous_function_that_raises_costs_the_samples_it_raises_for_all_asked_at_once():
    reward = FunctionReward("mine:odd_raises", timeout_s=30)
    assert reward(PROMPTS, ANSWERS) == [2.0, None, 2.0, None]
    assert reward.report.errors == 2 and "mine:odd_raises raised ValueError: odd (" in reward.report.error
    assert "mine.py:" in reward.report.error


def test_what_an_asynchronous_function_has_not_answered_by_its_deadline_has_no_reward():
    reward = FunctionReward("mine:never", timeout_s=0.1)
    assert reward(PROMPTS, ANSWERS) == [None] * 4
    assert reward.report.errors == 4
    assert reward.report.error == (
        "reward.function=mine:never has not answered within reward.timeout_s=0.1 seconds: raise it"
    )


# --- whole runs -------------------------------------------------------------------------------------------------------

SMOKE = ("experiment=smoke", "model=micro", "steps=2", "sft.steps=5", "logger=[jsonl,console]", "transfer=local")
SHORT = ("evaluate_every=2", "task.held_out=16", "task.prompts=64")


def test_a_run_goes_on_where_rewards_are_nan_counts_them_and_says_an_alarm(compose_run, tmp_path, capsys):
    config = compose_run(*SMOKE, *SHORT, "reward=function", "reward.function=mine:nan_of_long", "reward.max_failed=1.0")
    run(config, tmp_path / "run")
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in told if "train/loss" in row]
    assert len(trained) == 2
    for row in trained:
        assert 0 < row["train/reward_not_finite"] == row["train/excluded"] <= 32 and row["alarm/nan"] == 1.0
        assert all(math.isfinite(value) for value in row.values())
    assert any(row.get("eval/reward_not_finite") for row in told)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all((row["reward"] is None) == (len(row["answer"]) > 1) for row in samples)
    assert "rewards are NaN or infinite, and their samples left out" in capsys.readouterr().out


def test_a_function_that_gives_something_else_is_told_before_a_worker_starts_or_anything_is_trained(
    compose_run, tmp_path, monkeypatch, mine
):
    mine.answer = 0.5
    monkeypatch.setattr("rlhf.assembly.warm_up.sft", lambda *_: pytest.fail("SFT began"))
    parts = "reward.parts={mine: {kind: function, function: mine:gives}}"
    message = r"^reward\.parts\.mine\.function=mine:gives must return a list of 1 numbers or None \(got float\)"
    with pytest.raises(ValueError, match=message):
        run(compose_run(*SMOKE, "reward=sum", parts), tmp_path / "run")
    assert [path.name for path in Path(tmp_path / "run").iterdir()] == ["status.json"]
