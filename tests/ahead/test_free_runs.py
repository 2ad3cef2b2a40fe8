"""Whole runs whose groups come from a queue: nothing is lost, or learned from twice, whoever dies in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from ledger import expected, learned_from
from sizes import in_ci, in_full
from small import SMALL

OWN = ("steps=6", "rollout.ahead.order=free")
pytestmark = [pytest.mark.usefixtures("default_signals"), pytest.mark.lag(4)]


@pytest.fixture
def train(train_ahead):
    """`train_ahead` with what the runs of this file have."""
    return partial(train_ahead, *OWN)


def steps(folder: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("rollout.ahead.lag=2",),
        ("rollout.ahead.lag=4", "rollout.workers=2", "rollout.in_flight=keep", "transfer=disk"),
        ("rollout.ahead.lag=1", "task=guess", "reward=verifier", "rollout.in_flight=keep"),
    ],
)
def test_a_run_that_is_killed_learns_from_every_prompt_once_and_in_order(train, compose_run, overrides):
    train(*overrides, killed_at=3)
    train(*overrides, killed_at=5, resume=True)
    folder = train(*overrides, resume=True)
    assert learned_from(folder) == expected(4, compose_run(*SMALL, *OWN).seed, 24)
    rows = steps(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["rollout/lag_max"] <= int(overrides[0][-1]) for row in rows)
    assert any(row["rollout/lag"] > 0 for row in rows)


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_dials_has_samples_of_its_new_lag_for_all_its_steps(train):
    train("rollout.ahead.lag=4", "steps=20", killed_at=6)
    folder = train("rollout.ahead.lag=1", "prompts_per_step=2", "samples_per_prompt=3", "steps=9", resume=True)
    rows = steps(folder)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert all(row["rollout/lag_max"] <= 1 for row in rows[5:])


@pytest.mark.slow
def test_a_worker_that_dies_in_the_middle_loses_no_prompt(train, compose_run):
    killed = []

    def at(step):
        if step in (2, 4):
            (pid,) = [pid for pid in children() if pid not in killed][:1]
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    overrides = ("rollout.ahead.lag=2", "rollout.restarts=4", "rollout.in_flight=keep")
    assert learned_from(train(*overrides, at=at)) == expected(4, compose_run(*SMALL, *OWN).seed, 24)
    assert len(killed) == 2


def children() -> list[int]:
    """Workers of this process."""
    import psutil

    return [each.pid for each in psutil.Process().children() if "rlhf.rollout.worker" in " ".join(each.cmdline())]


@pytest.mark.slow
def test_groups_without_a_signal_are_told_apart_and_all_others_learned_from_once(train, compose_run):
    overrides = ("rollout.ahead.lag=1", "algo.dynamic_sampling=8", "reward=verifier", "samples_per_prompt=8")
    train(*overrides, killed_at=4)
    seeds = learned_from(train(*overrides, resume=True))
    known = expected(4, compose_run(*SMALL, *OWN).seed, 400)
    places = [known.index(seed) for seed in seeds]
    assert len(seeds) == 24 and places == sorted(set(places)), "some were left out, none came twice"


def test_a_lag_of_nothing_is_the_synchronous_run_whatever_the_order(train, compose_run):
    config = compose_run(*SMALL, *OWN)
    assert config.rollout.ahead.lag == 0
    rows = steps(train())
    assert [row["rollout/version"] for row in rows] == [0, 1, 2, 3, 4, 5] and "rollout/queue" not in rows[0]


@pytest.mark.parametrize("kills", [in_ci("8"), in_full("500", 1800)])
def test_however_often_trainer_and_workers_are_killed_no_prompt_is_lost_or_comes_twice(kills):
    command = [sys.executable, str(Path(__file__).parent / "kills.py"), "--kills", kills]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1700, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "none lost, none twice, none too old" in ended.stdout
