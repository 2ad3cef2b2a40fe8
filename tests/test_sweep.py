"""Sweeps through the command line: a process a job, one table, and a job that dies costs a row."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from forked import FRESH, LIGHT
from omegaconf import OmegaConf
from sizes import in_ci, in_full

from rlhf.reports.summary import write_summary
from rlhf.shell.ending import RunError, alone
from rlhf.sweep import run_job

TINY = (
    "experiment=smoke",
    "transfer=local",
    "logger=jsonl",
    "sft.steps=2",
    "task.held_out=8",
    "task.prompts=64",
    "evaluate_every=1",
)
REWARDS = """
import os, signal
from pathlib import Path

def first(name, completions):
    # of more than the one row that is tried before a run starts
    return len(completions) > 1 and not Path(name).exists() and not Path(name).touch()

def dies_once(prompts, completions, **columns):
    if first("died", completions):
        os._exit(137)
    return notes(prompts, completions)

def told_to_end_once(prompts, completions, **columns):
    if first("told", completions):
        os.kill(os.getpid(), signal.SIGTERM)
    return notes(prompts, completions)

def stops_all_once(prompts, completions, **columns):
    if first("stopped", completions):
        os.killpg(0, signal.SIGINT)
        signal.pause()
    return notes(prompts, completions)

def notes(prompts, completions, **columns):
    table = Path("sweep/summary.md")
    if len(completions) > 1:
        Path(f"process-{os.getpid()}").write_text(table.read_text() if table.exists() else "")
    return [float(len(text)) for text in completions]
"""

pytestmark = pytest.mark.usefixtures("default_signals")


@pytest.fixture
def sweep(rlhf_train, tmp_path):
    """`sweep("seed=0,1")` runs one into `sweep/` of the test's folder: what it printed, and the folder."""
    (tmp_path / "mine.py").write_text(REWARDS)

    def run(*overrides: str, timeout: float = 100, **options):
        options = {"timeout": timeout, "start_new_session": True} | options
        done = rlhf_train(*overrides, "hydra.sweep.dir=sweep", **options)
        return done, tmp_path / "sweep"

    return run


def table(folder: Path, name: str = "summary.csv") -> list[dict[str, str]]:
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def started(folder: Path) -> dict[str, str]:
    """The processes that computed rewards -> what the sweep's table was meanwhile."""
    return {path.name: path.read_text() for path in folder.glob("process-*")}


JOBS = ("-m", *TINY, "reward=function", "reward.function=mine:dies_once,mine:notes", "steps=1,0")


@pytest.mark.slow
def test_a_job_that_dies_costs_a_row_and_the_others_go_on(sweep):
    done, folder = sweep(*JOBS, env={FRESH: "1"})  # as users have it; elsewhere jobs are forked
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [row["status"] for row in table(folder)] == ["failed", "failed", "finished", "failed"]
    errors = [row["error"] for row in table(folder)]
    assert errors[0] == "the process died with exit code 137"
    assert errors[1] == errors[3] == "steps must be at least 1 (got 0)"
    assert "job 0 failed: the process died with exit code 137" in done.stderr
    (meanwhile,) = started(folder.parent).values()  # job 2 ran when the table had the two before it
    assert meanwhile.count("failed") == 2 and "finished" not in meanwhile
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "| the process died with exit code 137 |" in (folder / "summary.md").read_text()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            "transfer=ipc,ncll",
            r"\Atransfer=ipc,ncll: there is no transfer=ncll; choose from disk, gloo, handles, ipc, local, nccl\n\Z",
        ),
        ("seed=0,x", r"Value 'x' of type 'str' could not be converted to Integer\n    full_key: seed"),
        pytest.param(
            "transfer=ipc,disk transfer.slots=2,3", r"Key 'slots' not in 'DiskConfig'\n", marks=pytest.mark.slow
        ),
    ],
)
def test_a_slip_of_the_pen_in_one_of_a_sweep_s_values_is_refused_before_the_first_job(sweep, wrong, said):
    done, folder = sweep("-m", "experiment=smoke", *wrong.split(), env={LIGHT: "1"})
    assert done.returncode == 1 and re.search(said, done.stderr) and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == "" and not list(folder.glob("*/"))


@pytest.mark.slow
def test_optuna_is_told_what_each_trial_has_reached(sweep):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    sampler = ("hydra.sweeper.sampler.seed=0", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1")
    told = ("hydra/sweeper=optuna", *sampler, "hydra.sweeper.direction=maximize", "objective=reward", "steps=1")
    done, folder = sweep("-m", *TINY, *told, "optim.lr=interval(1e-4,1e-2)")
    assert done.returncode == 0, done.stderr
    tried = {row["overrides"].split("optim.lr=")[1].split()[0]: row for row in table(folder)}
    assert [row["status"] for row in tried.values()] == ["finished", "finished"]
    found = OmegaConf.load(folder / "optimization_results.yaml")
    assert found.best_value == max(float(row["reward_end"]) for row in tried.values())
    assert float(tried[str(found.best_params["optim.lr"])]["reward_end"]) == found.best_value


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_with_jobs_that_died_or_were_interrupted_has_them_in_its_table_and_runs_only_those_again(sweep):
    functions = "mine:dies_once,mine:told_to_end_once,mine:stops_all_once"
    six = ("-m", *TINY, "reward=function", f"reward.function={functions}", "steps=1", "seed=0,1")
    done, folder = sweep(*six, timeout=280)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    statuses = ["failed", "finished", "interrupted", "finished", "interrupted"]  # and then all was stopped
    assert [row["status"] for row in table(folder)] == statuses
    assert [row["runs"] for row in table(folder, "leaderboard.csv")] == ["2", "2", "1"]
    assert {row["finished"] for row in table(folder, "leaderboard.csv")} == {"1", "0"}
    assert len(started(folder.parent)) == 2

    done, folder = sweep(*six, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished already, skipped") == 2
    assert done.stdout.count("begun already, goes on after step 0") == 2, "those that were interrupted"
    assert len(started(folder.parent)) == 6, "each job has run to its end once"
    assert [row["status"] for row in table(folder)] == ["finished"] * 6
    assert [row["finished"] for row in table(folder, "leaderboard.csv")] == ["2"] * 3
    assert all(row["error"] == "" for row in table(folder))


def test_a_job_whose_folder_another_process_trains_in_leaves_it_as_it_is(compose_run, tmp_path):
    (tmp_path / "0").mkdir()
    write_summary(tmp_path / "0", "interrupted", [], {})
    before = (tmp_path / "0" / "summary.json").read_text()
    with alone(tmp_path / "0"), pytest.raises(RunError, match=r"another process trains in .*0: end it"):
        run_job(compose_run(*TINY), tmp_path / "0", [], tmp_path)
    assert (tmp_path / "0" / "summary.json").read_text() == before


def test_the_jobs_that_a_sweep_will_have_are_known_before_it_begins(tmp_path):
    """Also those of an experiment whose choices stand in its file."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from rlhf.compose import CONF, register
    from rlhf.occupied import _jobs

    register()
    given = ["experiment=compare_transfers", "seed=0,1"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = GlobalHydra.instance().config_loader().load_configuration("config", given, RunMode.MULTIRUN)
    jobs = dict(_jobs(config, tmp_path))
    assert len(jobs) == 2 * 2 * 2 and list(jobs)[-1] == tmp_path / "7"
    assert jobs[tmp_path / "1"] == ["transfer=ipc", "transfer/sender=http", "experiment=compare_transfers", "seed=1"]


@pytest.mark.slow
def test_a_finished_job_is_not_written_over_by_another_sweep_and_more_seeds_may_follow(sweep):
    first = table(sweep("-m", *TINY, "seed=0,1", "steps=1")[1])
    done, folder = sweep("-m", *TINY, "seed=0,1", "steps=2")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    said = "sweep/0 holds a finished job with steps=1, where this sweep would have one with steps=2: choose another"
    assert said in done.stderr and table(folder) == first
    done, folder = sweep("-m", *TINY, "seed=0,1,2", "steps=1")
    assert done.returncode == 0 and done.stdout.count("skipped") == 2
    assert [row["status"] for row in table(folder)] == ["finished"] * 3


@pytest.mark.parametrize(
    "overrides",
    [
        in_ci("-m transfer=ipc,disk transfer/sender=http,ray experiment=smoke steps=2"),
        in_full("experiment=compare_transfers steps=2"),  # of which a fast test above composes the jobs
    ],
)
def test_backends_and_senders_are_compared_side_by_side(sweep, overrides):
    done, folder = sweep(*overrides.split(), timeout=280)
    assert done.returncode == 0, done.stderr
    rows = table(folder)
    ways = [{word for word in row["overrides"].split() if word.startswith("transfer")} for row in rows]
    assert ways == [
        {f"transfer={backend}", f"transfer/sender={sender}"}
        for backend in ("ipc", "disk")
        for sender in ("http", "ray")
    ]
    assert len({(row["reward_end"], row["gold_end"]) for row in rows}) == 1
    assert all(row["status"] == "finished" and float(row["transfer_ms"]) > 0 for row in rows)
    assert (folder / "summary.md").read_text().count("finished") == 4
