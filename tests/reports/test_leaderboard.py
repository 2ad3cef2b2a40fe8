"""A sweep's tables: seeds are one row with their mean and spread, the best stands first, and no job is missing."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import pytest

from rlhf.config import Objective
from rlhf.reports.leaderboard import leaderboard, shown, write_tables
from rlhf.reports.run_folder import read_run
from rlhf.reports.summary import write_summary
from rlhf.sweep import main

COMMON = ["experiment=smoke", "steps=6"]


def job(sweep: Path, number: int | str, own: str, status: str = "finished", objective: str = "null", **numbers) -> Path:
    """A job's folder as Hydra and the run leave it."""
    folder = sweep / str(number)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(f"steps: 6\nobjective: {objective}\n")
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {word}\n" for word in [*COMMON, *own.split()]))
    if status != "running":
        write_summary(folder, status, [*COMMON, *own.split()], numbers)
    return folder


@pytest.fixture
def sweep(tmp_path):
    """Three algorithms with two seeds; one job has died, one was interrupted, and one runs still."""
    job(tmp_path, 0, "algo=ppo seed=0", gold_end=0.5, step_ms=10.0)
    job(tmp_path, 1, "algo=ppo seed=1", "failed", error="Traceback\n\nOutOfMemoryError: too big | far\n")
    job(tmp_path, 2, "algo=grpo seed=0", gold_end=0.7, step_ms=30.0)
    job(tmp_path, 3, "algo=grpo seed=1", gold_end=0.9, step_ms=50.0)
    job(tmp_path, 4, "algo=rloo seed=0", "interrupted")
    job(tmp_path, 5, "algo=rloo seed=1", "running")
    return tmp_path


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_seeds_are_one_row_with_mean_and_standard_deviation_and_the_best_stands_first(sweep):
    assert write_tables(sweep) == 6
    first, second, third = read(sweep / "leaderboard.csv")
    assert [first["tried"], second["tried"], third["tried"]] == ["algo=grpo", "algo=ppo", "algo=rloo"]
    assert float(first["gold_end"]) == pytest.approx(0.8)
    assert float(first["gold_end_std"]) == pytest.approx(statistics.stdev([0.7, 0.9]))
    assert (second["gold_end"], second["gold_end_std"]) == ("0.5", ""), "one run has no spread"
    assert [(row["finished"], row["runs"]) for row in (first, second, third)] == [("2", "2"), ("1", "2"), ("0", "2")]
    table = (sweep / "summary.md").read_text()
    assert "| 1 | algo=grpo | 2 | 0.8 ± 0.14 |" in table and "| - | algo=rloo | 0 of 2 |" in table


def test_every_job_has_a_row_with_its_status_and_the_last_line_of_its_error(sweep):
    write_tables(sweep)
    rows = read(sweep / "summary.csv")
    assert [row["status"] for row in rows] == [
        "finished",
        "failed",
        "finished",
        "finished",
        "interrupted",
        "unfinished",
    ]
    assert [row["error"] for row in rows] == ["", "OutOfMemoryError: too big | far", "", "", "", ""]
    assert rows[5]["overrides"] == "experiment=smoke steps=6 algo=rloo seed=1", "read from what Hydra was told"
    assert r"| OutOfMemoryError: too big \| far |" in (sweep / "summary.md").read_text()


@pytest.mark.parametrize(("objective", "best"), [(Objective.step_ms, "algo=ppo"), (Objective.gold, "algo=grpo")])
def test_times_are_better_when_they_are_smaller(sweep, objective, best):
    runs = [read_run(sweep / str(number)) for number in range(6)]
    name, places = leaderboard(runs, objective)
    assert (name, places[0].line.label) == (objective.key, best)
    assert list(shown(name, places)[0])[3] == objective.key, "its column comes first"


def test_the_objective_is_what_the_sweep_was_told_or_the_command_line_says(sweep, capsys):
    job(sweep, 6, "algo=dapo seed=0", objective="step_ms", gold_end=0.1, step_ms=1.0)
    write_tables(sweep)
    assert next(row["tried"] for row in read(sweep / "leaderboard.csv")) == "algo=dapo"
    main([str(sweep), "--by", "gold"])
    assert next(row["tried"] for row in read(sweep / "leaderboard.csv")) == "algo=grpo"
    assert "## By gold_end" in capsys.readouterr().out


def test_without_gold_a_sweep_is_sorted_by_reward_and_nan_has_no_place(tmp_path):
    job(tmp_path, 0, "algo=ppo", reward_end=float("nan"))
    job(tmp_path, 1, "algo=grpo", reward_end=1.0)
    job(tmp_path, 2, "algo=rloo", reward_end=2.0)
    name, places = leaderboard([read_run(tmp_path / str(number)) for number in range(3)])
    assert (name, [place.line.label for place in places]) == ("reward_end", ["algo=rloo", "algo=grpo", "algo=ppo"])


def test_the_largest_k_is_meant_by_pass_at_k(tmp_path):
    job(tmp_path, 0, "algo=ppo", pass_at_1_end=0.9, pass_at_16_end=0.91)
    job(tmp_path, 1, "algo=grpo", pass_at_1_end=0.8, pass_at_16_end=0.99)
    name, places = leaderboard([read_run(tmp_path / str(number)) for number in range(2)], Objective.pass_at_k)
    assert (name, places[0].line.label) == ("pass_at_16_end", "algo=grpo")


def test_a_folder_without_jobs_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "holds no jobs of a sweep" in capsys.readouterr().err


def test_jobs_in_folders_within_folders_are_found_and_named_by_their_place(tmp_path):
    """As hydra.sweep.subdir=a/${hydra.job.num} has them, or one that an override's value with a slash makes."""
    for number, place in enumerate(("10", "2", "algo=ppo/0", "algo=grpo/seeds/1")):
        job(tmp_path, place, f"seed={number}", gold_end=float(number))
    (tmp_path / "2" / "checkpoints" / ".hydra").mkdir(parents=True)
    (tmp_path / "2" / "checkpoints" / ".hydra" / "config.yaml").write_text("")  # within a job: none of the sweep's
    assert write_tables(tmp_path) == 4
    names = [row["job"] for row in read(tmp_path / "summary.csv")]
    assert names == ["2", "10", "algo=grpo/seeds/1", "algo=ppo/0"]
    (row,) = read(tmp_path / "leaderboard.csv")
    assert (row["finished"], float(row["gold_end"])) == ("4", 1.5)
