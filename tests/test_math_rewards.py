"""reward=math, and task.answer_after: right and wrong answers, in GSM8K's own form, and answers that never end."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlhf.config import FileTaskConfig, HfTaskConfig, JsonlTaskConfig, MathRewardConfig
from rlhf.preflight import before_torch
from rlhf.rewards import VerifierReward
from rlhf.rewards.mathematics import MathReward, check_math
from rlhf.run import run
from rlhf.tasks import read_task
from rlhf.tasks.compare import same_answer
from rlhf.types import Prompt

GSM8K = [  # in the form in which it is published
    {
        "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
        "How many clips did Natalia sell altogether in April and May?",
        "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips "
        "altogether in April and May.\n#### 72",
    },
    {
        "question": "A house costs $1,200 more than last year, when it cost $9,000. What does it cost?",
        "answer": "It costs 9000+1200 = $<<9000+1200=10200>>10,200.\n#### 10,200",
    },
    {"question": "Ten less thirteen?", "answer": "10-13 = <<10-13=-3>>-3.\n#### -3"},
    {"question": "Half of one?", "answer": "1/2 = <<1/2=0.5>>0.5.\n#### 0.5"},
]
RIGHT = ["So it is 24 in May and 72 in all.\n#### 72", "#### 10200", "10-13 = -3\n#### -3", "#### 0.5 \n"]
WRONG = ["#### 24", "72 #### 1020", "10-13 = -3\n#### 3", "I do not know"]


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    made = MathReward(MathRewardConfig(timeout_s=30.0))
    yield made
    made.close()


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    return path


def task(path: Path, **dials: object):
    return read_task(JsonlTaskConfig(path=str(path), held_out=1, prompt_column="question", **dials), 0)


def asked(path: Path, **dials: object) -> list[Prompt]:
    """The file's rows, in its order."""
    raw = task(path, **dials)
    there = {row.question: Prompt(row.question, (1,), row.columns) for row in [*raw.train, *raw.held_out]}
    return [there[row["question"]] for row in GSM8K]


# --- gsm8k's rows -----------------------------------------------------------------------------------------------------


def test_of_gsm8ks_rows_right_answers_have_1_and_wrong_ones_0(rows, reward):
    prompts = asked(rows)
    assert reward(prompts, RIGHT) == [1.0] * 4 and reward(prompts, WRONG) == [0.0] * 4
    assert reward(prompts, [row["answer"] for row in GSM8K]) == [1.0] * 4
    assert reward.report.errors == 0 and reward.report.counts == {}


def test_with_a_mark_the_verifier_compares_what_follows_it(rows):
    verifier = VerifierReward(task(rows, answer_after="####"))
    prompts = asked(rows)
    assert verifier(prompts, RIGHT) == [1.0] * 4 and verifier(prompts, WRONG) == [0.0] * 4
    assert verifier(prompts, [row["answer"] for row in GSM8K]) == [1.0] * 4
    assert VerifierReward(task(rows))(prompts, RIGHT) == [0.0] * 4, "without it, all of the answer"


def test_of_gsm8ks_parquet_right_answers_have_1_and_wrong_ones_0_by_both(tmp_path, reward):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "main" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_list(GSM8K).to_parquet(str(path))
    config = HfTaskConfig(path=str(path), held_out=1, prompt_column="question", answer_after="####")
    raw = read_task(config, 0)
    there = {row.question: Prompt(row.question, (1,), row.columns) for row in [*raw.train, *raw.held_out]}
    prompts = [there[row["question"]] for row in GSM8K]
    for each in (reward, VerifierReward(raw)):
        assert each(prompts, RIGHT) == [1.0] * 4 and each(prompts, WRONG) == [0.0] * 4


@pytest.mark.parametrize(
    ("reference", "answer", "same"),
    [
        ("a #### 72", "#### 72", True),
        ("a #### 72", "#### 7 #### 72.", True),
        ("a #### 72", "#### 72 #### 7", False),
        ("a #### 72", "72", False),
        ("72", "#### 72", True),
        ("#### 1,234", "#### $1234", True),
        ("#### 1,234", "#### 1,23,4", False),
        ("#### blue", "####  blue\n", True),
        ("#### blue", "#### Blue", False),
        ("#### 72", "####", False),
        ("#### -3", "#### 3", False),
    ],
)
def test_what_follows_the_last_mark_decides(reference, answer, same):
    assert same_answer("answer", "####", {"answer": reference}, answer) == float(same)
    assert same_answer("answer", "####", {}, answer) is None


def test_a_mark_that_no_reference_has_is_refused(rows):
    with pytest.raises(ValueError, match=r"^task\.answer_after='Answer:' is in no 'answer' of task\.path: change it"):
        task(rows, answer_after="Answer:")
    with pytest.raises(ValueError, match=r"^task\.answer_after must be a text like '####', or null \(got ' '\)"):
        FileTaskConfig(path="x", answer_after=" ")


# --- mathematics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        ("72", "the answer is 72", True),
        ("72", r"so \boxed{72}", True),
        ("72", "72.00", True),
        ("72", "", False),
        (r"\frac{1}{2}", r"\boxed{0.5}", True),
        (r"\frac{1}{2}", "1/2", True),
        (r"\boxed{\frac{1}{2}}", "1/3", False),
        ("(1,2)", r"\boxed{(1,2)}", True),
        ("2x+3", r"$3+2x$", True),
        ("2x+3", r"$3-2x$", False),
        (r"$\sqrt{2}$", r"$2^{1/2}$", True),
        ("#### 18", "#### 18 dollars", True),
        ("blue", "blue", True),
    ],
)
def test_answers_are_compared_as_mathematics(reward, reference, answer, equal):
    assert reward([Prompt("?", (1,), {"answer": reference})], [answer]) == [float(equal)]


def test_a_row_without_a_reference_has_no_reward_and_one_that_cannot_be_read_is_counted(reward):
    prompts = [Prompt("?", (1,), columns) for columns in ({}, {"answer": 72}, {"answer": "####"}, {"answer": "1"})]
    assert reward(prompts, ["72", "72", "72", "1"]) == [None, None, None, 1.0]
    assert reward.report.counts == {"raised": 1} and reward.report.errors == 1
    assert "finds no expression in the reference '####'" in reward.report.error


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.slow
def test_an_answer_that_is_computed_for_ever_has_no_reward_at_its_deadline_and_leaves_no_process():
    before, hostile = children(), MathReward(MathRewardConfig(timeout_s=1.0))
    prompts, answers = [Prompt("?", (1,), {"answer": "72"})] * 3, ["#### 72", "#### 9**9**9**9", "#### 73"]
    began = time.monotonic()
    assert hostile(prompts, answers) == [1.0, None, 0.0], "the answers beside it are compared"
    assert time.monotonic() - began < 60
    assert hostile.report.counts == {"timed_out": 1} and hostile.report.errors == 1
    assert "within reward.timeout_s=1 seconds" in hostile.report.error
    (process,) = children() - before
    hostile.close()
    assert not psutil.pid_exists(process)


def test_a_reward_that_nobody_holds_any_more_has_no_process():
    before, forgotten = children(), MathReward(MathRewardConfig(timeout_s=30.0))
    assert forgotten([Prompt("?", (1,), {"answer": "72"})], ["#### 72"]) == [1.0]
    (process,) = children() - before
    del forgotten
    gc.collect()
    assert not psutil.pid_exists(process), "whoever forgets the reward ends its process"


COMPUTES = """
import os, threading
from rlhf.config import MathRewardConfig
from rlhf.rewards.mathematics import MathReward
from rlhf.shell import apart
from rlhf.types import Prompt
apart.GRACE_S = 1.0
threading.Timer(2.5, os.kill, (os.getpid(), 9)).start()
MathReward(MathRewardConfig(timeout_s=4.0))([Prompt("?", (1,), {"answer": "72"})], ["#### 9**9**9**9"])
"""


@pytest.mark.slow
def test_a_process_that_computes_for_ever_ends_also_where_whoever_asked_is_killed(tmp_path):
    marked = {**os.environ, "RLHF_TEST_MARK": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPUTES], env=marked, timeout=60, check=False)

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RLHF_TEST_MARK") == str(tmp_path):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    until = time.monotonic() + 60
    while left() and time.monotonic() < until:
        time.sleep(0.1)
    assert left() == []


# --- before anything is trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows_of", "message"),
    [
        ([{"solution": "1"}], r"no row has a text in 'answer' \(reward\.answer_column\); .* columns are solution$"),
        (
            [{"answer": "so: ####"}],
            r"finds no expression in the reference .*: 'answer' \(reward\.answer_column\) must hold",
        ),
    ],
)
def test_references_that_are_none_are_told_before_anything_is_trained(tmp_path, rows_of, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", **row}) + "\n" for n in range(3) for row in rows_of))
    with pytest.raises(ValueError, match=message):
        check_math(MathRewardConfig(), task(path))


def test_without_the_package_its_name_is_said(rows, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^reward=math needs the package math-verify: pip install -e '\.\[math\]'$"):
        check_math(MathRewardConfig(), task(rows))


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["math", "verifier"])
def test_a_run_learns_from_gsm8ks_rows(compose_run, rows, tmp_path, reward):
    overrides = ["experiment=smoke", "model=micro", "steps=1", "sft.steps=1", "logger=jsonl", "transfer=local"]
    data = ["task=jsonl", f"task.path={rows}", "task.prompt_column=question", "task.held_out=1", "prompts_per_step=2"]
    sizes = ["evaluate_every=9", "rollout.max_new_tokens=8", f"reward={reward}"]
    config = compose_run(*overrides, *data, *sizes, "task.answer_after='####'")
    before_torch.look(config)
    run(config, tmp_path / "run")
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:2]
    assert row["train/reward"] == 0.0 and row["train/excluded"] == 0.0
