"""Choices of one's own (--config-dir, hydra.searchpath): help and resume find them as the run has found them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf import resume
from rlhf.compose import misplaced
from rlhf.shell.search_path import of_command
from rlhf.train import print_help

ROOT = Path(__file__).resolve().parent.parent
MINE = """\
# @package _global_
defaults:
  - /experiment/smoke
  - override /task: own
steps: 2
"""
OWN = """\
defaults:
  - /schema/task/sort@_here_
  - _self_
letters: 4
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Two folders in the working directory: `my/` with experiment=mine, and `more files/` with task=own."""
    for name, text in {"my/experiment/mine.yaml": MINE, "more files/task/own.yaml": OWN}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(mine):
    """A folder in which Hydra has noted a run of experiment=mine."""
    hydra = mine / "run" / ".hydra"
    hydra.mkdir(parents=True)
    where, overrides = of_command(["--config-dir", "my", "hydra.searchpath=[file://more files]", "experiment=mine"])
    config, choices = resume._compose(overrides, where)
    noted = [
        {"path": "hydra.conf", "schema": "pkg", "provider": "hydra"},
        {"path": str(ROOT / "conf"), "schema": "file", "provider": "main"},
        {"path": str(mine / "my"), "schema": "file", "provider": "command-line"},
        {"path": "more files", "schema": "file", "provider": "hydra.searchpath in command-line"},
        {"path": "", "schema": "structured", "provider": "schema"},
    ]
    runtime = {"choices": choices, "cwd": str(mine), "config_sources": noted}
    told = {"hydra": {"runtime": runtime, "job": {"config_name": "config"}}}
    for name, node in {"config": config, "hydra": told, "overrides": overrides}.items():
        (hydra / f"{name}.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(node)))
    return mine / "run"


@pytest.mark.parametrize(
    "told",
    [
        ["--config-dir", "my", "hydra.searchpath=['file://more files']", "experiment=mine"],
        ["experiment=mine", "--config-dir=my", "hydra.searchpath=['more files']", "seed=3"],
        ["hydra.searchpath=[my,file://more files]", "experiment=mine"],
    ],
)
def test_help_lists_and_composes_choices_of_one_s_own(mine, capsys, told):
    print_help(told)
    said = capsys.readouterr().out
    assert (
        "task             agent arithmetic environment given guess hf jsonl own reasoning_gym" in said
        and " mine " in said
    )
    assert "letters: 4" in said and "\nsteps: 2\n" in said


def test_an_override_of_the_wrong_choice_is_hinted_at_there_too(mine):
    told = ["--config-dir", "my", "hydra.searchpath=['more files']", "experiment=mine", "task.max_number=3"]
    assert misplaced(told) == [
        "that key belongs to the arithmetic task: task.max_number needs task=arithmetic"
    ]  # fmt: skip


def test_a_resume_in_another_working_directory_finds_them_by_absolute_paths(run, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config, overrides = resume.composed(run, [])
    assert (config.steps, config.task.letters, overrides) == (2, 4, ["experiment=mine"])


def test_a_folder_that_is_gone_is_named_and_where_it_is_now_can_be_said_once(run, mine):
    (mine / "my").rename(mine / "moved")
    with pytest.raises(ValueError, match=rf"^the run found choices in {mine / 'my'}, which is no folder any more: "):
        resume.composed(run, [])
    where, _ = of_command(["--config-dir", "moved"])
    assert resume.composed(run, [], where)[0].steps == 2
    assert resume.composed(run, ["steps=3"])[0].steps == 3, "noted for the next time"
    noted = OmegaConf.load(run / ".hydra" / "hydra.yaml").hydra.runtime.config_sources
    paths = {each.path: each.provider for each in noted}
    assert paths[str(mine / "moved")] == paths[str(mine / "more files")] == "command-line" and "hydra.conf" in paths
    assert str(mine / "my") not in paths


def test_a_folder_of_a_run_may_have_an_equals_sign_in_its_name(run, tmp_path, monkeypatch, capsys):
    shutil.rmtree(tmp_path / "lr=0.1", ignore_errors=True)
    run.rename(tmp_path / "lr=0.1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["resume", "lr=0.1", "steps=0"])
    monkeypatch.setattr("rlhf.train.as_command", lambda _: nullcontext())  # signals are pytest's
    with pytest.raises(SystemExit) as ended:
        resume.main()
    assert ended.value.code == 1 and "steps must be at least 1 (got 0)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_an_experiment_of_one_s_own_is_resumed_from_elsewhere(mine, rlhf_train):
    small = ("transfer=local", "logger=jsonl", "sft.steps=2", "task.held_out=8")
    told = ("--config-dir", "my", "hydra.searchpath=['file://more files']", "experiment=mine", *small)
    done = rlhf_train(*told, "steps=1", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    (mine / "elsewhere").mkdir()
    command = [sys.executable, "-m", "rlhf.resume", "../run", "steps=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, cwd=mine / "elsewhere", capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "other dials from here on: steps is 2 (was 1)" in done.stdout
    assert json.loads((mine / "run" / "summary.json").read_text())["steps"] == 2
