"""Whole runs of several ranks: the numbers of one process, and what is said and left when one of them ends."""

from __future__ import annotations

import json
import re

import pytest
from rank_runs import ASLEEP_S, SMALL, Ended, Runs

SOON_S = 30.0  # 2 s on a quiet machine; who waits for what sleeps waits for ASLEEP_S
WITHOUT_A_WORD = "rank 1 of the trainer has ended without a word: was it killed, or out of memory?"
SAID_ANYHOW = re.compile(r"step \d is saved: go on with|Error executing job|Set the environment")
REPLICAS = ("trainer=replicas", "trainer.ranks=2")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_signals"), pytest.mark.timeout(600)]


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    """The numbers and digests of one process."""
    made = Runs(tmp_path_factory.mktemp("one"))
    ended = made.train()
    assert ended.code == 0, ended.errors
    steps = [row for row in made.numbers() if "train/loss" in row]
    assert len(steps) == len({row["train/loss"] for row in steps}) == 3 and list(made.digests()) == [0, 1, 2, 3]
    (micro_batches,) = made.shares()
    assert micro_batches > 3, "some steps have two"
    assert len(made.of_warm_up()) == 2 * 4 and sum(made.of_warm_up()) == 24 * 4, "and all of the warm-up's"
    return made.numbers(), made.digests()


def assert_one_line_says(ended: Ended, said: str) -> None:
    assert [line for line in ended.lines if not SAID_ANYHOW.match(line)] == [said], ended.errors


def assert_as_of_one(runs: Runs, of_one) -> None:
    numbers, digests = of_one
    assert runs.numbers() == numbers
    ours = runs.digests()
    assert {version: digests[version] for version in ours} == ours and max(ours) == max(digests)


def test_two_ranks_have_the_numbers_and_weights_of_one_process_and_write_nothing_of_their_own_but_a_log(runs, of_one):
    ended = runs.train(*REPLICAS)
    assert ended.code == 0, ended.errors
    assert_as_of_one(runs, of_one)
    ended.assert_nothing_is_left()
    assert len(runs.shares()) == 2 and all(runs.shares())
    assert len(runs.of_warm_up()) == 2 * 4, "divided, not computed twice"
    logs = [path.name for path in (runs.folder / "run").glob("rank-*")]
    assert logs == ["rank-1.log"] and (runs.folder / "run/rank-1.log").read_text() == ""
    journals = {path.name for path in (runs.folder / "run/journal").iterdir()}
    assert journals == {"trainer.jsonl", "worker-0.jsonl"}


def test_three_ranks_of_which_one_has_no_row_and_a_worker_that_is_killed_change_no_number(runs, of_one):
    ended = runs.train("trainer=replicas", "trainer.ranks=3", harm="kill-worker")
    assert ended.code == 0, ended.errors
    assert "was started again" in ended.output
    assert_as_of_one(runs, of_one)
    ended.assert_nothing_is_left()
    assert len(runs.shares()) < 3 or min(runs.shares()) < max(runs.shares())


def test_ranks_that_torchrun_has_started_are_those_that_a_run_starts_itself(runs, of_one):
    ended = runs.torchrun(2, "trainer=replicas")
    assert ended.code == 0, ended.errors
    assert_as_of_one(runs, of_one)
    ended.assert_nothing_is_left()
    assert all(runs.shares()) and len(runs.shares()) == 2
    assert ended.output.count("written: ") == 1, "the first rank alone says something"


def test_a_reward_model_and_the_run_that_it_judges_are_the_same_whoever_trains_it(tmp_path):
    words = [word for word in SMALL if not word.startswith("reward")]
    words += ["reward=model", "reward.steps=4", "reward.prompts=24", "reward.prompts_per_batch=4", "transfer.take=copy"]
    made = []
    for name, trainer in {"one": (), "replicas": REPLICAS, "sharded": ("trainer=sharded", "trainer.ranks=2")}.items():
        (tmp_path / name).mkdir()
        runs = Runs(tmp_path / name)
        ended = runs.command(["-m", "rlhf.train", *words, *trainer])
        assert ended.code == 0, ended.errors
        ended.assert_nothing_is_left()
        summary = json.loads((runs.folder / "run/summary.json").read_text())
        notes = {key: value for key, value in summary.items() if key.startswith("reward_model")}
        weights = (runs.folder / "run/reward_model/model.safetensors").read_bytes()
        made.append((runs.numbers(), runs.digests(), notes, weights))
    assert len(made[0][2]) == 3 and made[0][2]["reward_model_margin"] != 0, "it is trained"
    assert made[1] == made[0] and made[2] == made[0]


def test_a_rank_that_is_killed_while_the_first_waits_for_a_reward_ends_the_run_at_once_and_a_resume_goes_on(
    runs, of_one
):
    ended = runs.train(*REPLICAS, harm="kill-rank asleep")
    assert ended.code == 1 and ended.seconds < SOON_S < ASLEEP_S, ended.errors
    said = WITHOUT_A_WORD
    assert_one_line_says(ended, said)
    ended.assert_nothing_is_left()
    resumed = runs.resume()
    assert resumed.code == 0, resumed.errors
    assert_as_of_one(runs, of_one)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("learning kill", WITHOUT_A_WORD),
        ("pushing kill-rank", WITHOUT_A_WORD),
        ("learning raise", "rank 1 of the trainer: ZeroDivisionError: a kernel of the test"),
        ("learning stop", "rank 1 of the trainer has not answered for 3 s (trainer.timeout_s)"),
    ],
)
def test_a_rank_that_ends_or_hangs_in_a_step_ends_the_run_with_one_line_that_says_why(runs, harm, said):
    ended = runs.train(*REPLICAS, "trainer.timeout_s=3", harm=harm)
    assert ended.code == 1 and ended.seconds < SOON_S, ended.errors
    assert_one_line_says(ended, said)
    ended.assert_nothing_is_left()


@pytest.mark.parametrize("trainer", ["replicas", "sharded"])
def test_a_rank_that_is_killed_during_a_long_warm_up_ends_it(runs, trainer):
    words = (f"trainer={trainer}", "trainer.ranks=2", "transfer.take=copy", "sft.steps=10000000")
    ended = runs.train(*words, harm="warm-up kill")
    assert ended.code == 1 and ended.seconds < SOON_S, ended.errors
    assert_one_line_says(ended, WITHOUT_A_WORD)
    ended.assert_nothing_is_left()


def test_an_error_that_the_first_rank_meets_outside_is_the_run_s_one_line_and_no_rank_is_blamed(runs):
    ended = runs.train(*REPLICAS, "rollout.restarts=0", harm="kill-worker")
    assert ended.code == 1 and ended.seconds < SOON_S, ended.errors
    (said,) = [line for line in ended.lines if not SAID_ANYHOW.match(line)]
    assert "worker 0" in said and "rank" not in said
    ended.assert_nothing_is_left()


def test_a_run_of_two_ranks_that_is_terminated_saves_and_one_process_goes_on_with_it(runs, of_one):
    ended = runs.train(*REPLICAS, harm="terminate asleep")
    assert ended.code == 75 and ended.seconds < SOON_S, ended.errors
    assert "Traceback" not in ended.errors
    ended.assert_nothing_is_left()
    resumed = runs.resume("trainer.ranks=1")
    assert resumed.code == 0, resumed.errors
    assert "trainer.ranks is 1 (was 2)" in resumed.output
    assert_as_of_one(runs, of_one)


def test_a_run_of_one_process_that_is_interrupted_saves_and_two_ranks_go_on_with_it(runs, of_one):
    ended = runs.train(harm="interrupt asleep")
    assert ended.code == 130, ended.errors
    resumed = runs.resume(*REPLICAS)
    assert resumed.code == 0, resumed.errors
    assert "trainer is replicas (was one)" in resumed.output
    assert_as_of_one(runs, of_one)
    resumed.assert_nothing_is_left()


def test_stacks_of_a_run_that_does_not_go_on_are_those_of_all_ranks(runs):
    ended = runs.train(*REPLICAS, harm="stacks")
    assert ended.code == 0, ended.errors
    stacks = {name: (runs.folder / "run" / name).read_text() for name in ("stacks.txt", "rank-1.log", "worker-0.log")}
    assert all("most recent call first" in text for text in stacks.values())
    assert "rlhf/ranks/watch.py" in stacks["stacks.txt"] and "rlhf/ranks/watch.py" in stacks["rank-1.log"]


def test_ctrl_c_ends_all_ranks_and_saves(runs):
    ended = runs.train(*REPLICAS, harm="interrupt asleep")
    assert ended.code == 130 and ended.seconds < SOON_S, ended.errors
    assert "interrupted: workers and shared memory are released" in ended.errors and "Traceback" not in ended.errors
    ended.assert_nothing_is_left()
    assert json.loads((runs.folder / "run/status.json").read_text())["state"] == "stopped"
    assert list((runs.folder / "run/checkpoints").iterdir())


def test_a_check_makes_one_step_with_all_ranks_and_leaves_nothing(runs):
    ended = runs.train(*REPLICAS, "mode=check")
    assert ended.code == 0, ended.errors
    assert "all is well" in ended.output and "rank-1.log" in ended.output
    assert "each of the trainer's 2 ranks, the first on cpu" in ended.output
    ended.assert_nothing_is_left()
    assert {path.name for path in runs.folder.iterdir()} - {"mine.py", "stdout", "stderr", "__pycache__"} == {
        "shares-0",
        "shares-1",
        "warm-up",
    }
