"""`python -m rlhf.train` before it trains: quick answers, exit codes, and an installed copy that finds its dials."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from forked import FRESH, LIGHT

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_HEAVY = {LIGHT: "1"}


@pytest.fixture
def fresh(tmp_path):
    """Variables of a process that imports all itself, and cannot import what is heavy."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("from light import refuse\nrefuse()\n")
    return {"PYTHONPATH": f"{folder}:{ROOT}:{ROOT / 'tests'}", FRESH: "1"}


def test_the_refusal_of_heavy_imports_works(rlhf_train, fresh):
    for variables in (fresh, WITHOUT_HEAVY):
        done = rlhf_train("experiment=smoke", env=variables)
        assert done.returncode == 1 and "AssertionError: imported " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"), [pytest.param("--help", 0, marks=pytest.mark.slow), ("steps=3 stepz=4", 1)]
)
def test_what_does_not_train_imports_nothing_heavy_from_the_start(rlhf_train, fresh, arguments, code):
    done = rlhf_train(*arguments.split(), env=fresh)
    assert done.returncode == code and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "screen"),
    [
        ("--help", 0, "transfer         disk gloo handles ipc local nccl"),
        pytest.param("--help algo=rloo", 0, "advantage: leave_one_out", marks=pytest.mark.slow),
        ("--help algo=nothing", 1, "Could not find 'algo/nothing'"),
        ("--help typo=1", 1, "Could not override 'typo'"),
        ("--cfg job", 0, "samples_per_prompt: 8"),
        pytest.param("experiment=compare_transfers --cfg job", 0, "evaluate_every: 3", marks=pytest.mark.slow),
        pytest.param("steps=3 stepz=4", 1, "Could not override 'stepz'", marks=pytest.mark.slow),
        pytest.param(
            "model.lora.rank=8 algo.ref_every=5",
            1,
            "the reference of an adapter is the base below it, which stays",
            marks=pytest.mark.slow,
        ),
        ("prompts_per_step=0", 1, "prompts_per_step must be at least 1 (got 0)"),
        pytest.param("-m seed=0,1 typo=1", 1, "Could not override 'typo'", marks=pytest.mark.slow),
        ("logger=[console,jsonk]", 1, "there is no logger=jsonk; choose from console, jsonl, mlflow, "),
        ("hydra.run.dir=/proc/version/run", 1, "/proc/version/run cannot be made (Not a directory): choose another"),
        pytest.param("--help", 0, "python -m rlhf.train mode=check", marks=pytest.mark.slow),
        pytest.param("mode=check --cfg job", 0, "mode: check", marks=pytest.mark.slow),
        pytest.param("mode=chek", 1, "Invalid value 'chek', expected one of [train, check]", marks=pytest.mark.slow),
        pytest.param(
            "mode=check prompts_per_step=0", 1, "prompts_per_step must be at least 1 (got 0)", marks=pytest.mark.slow
        ),
        ("mode=check -m seed=0,1", 1, "mode=check looks at one run: leave out -m"),
    ],
)
def test_what_does_not_train_imports_nothing_heavy(rlhf_train, arguments, code, screen):
    done = rlhf_train(*arguments.split(), env=WITHOUT_HEAVY)
    assert (done.returncode, screen in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_printed_run_is_the_one_that_the_overrides_compose(rlhf_train):
    done = rlhf_train("--cfg", "job", "task=reverse", "transfer=disk", "transfer.keep=5", "seed=7", env=WITHOUT_HEAVY)
    run = yaml.safe_load(done.stdout)
    assert {"path", "keep", "verify", "sender"} < set(run["transfer"]) and run["transfer"]["keep"] == 5
    assert run["seed"] == 7 and run["algo"]["name"] == "grpo"


def test_a_users_mistake_that_no_configuration_shows_is_one_clear_line(rlhf_train):
    done = rlhf_train("reward=function", "reward.function=nothing:f", "model=micro")
    assert done.returncode == 1
    message = "reward.function=nothing:f cannot be imported, from the current folder or the Python path: "
    assert [line for line in done.stderr.splitlines() if line.startswith(message)]
    assert "Traceback" not in done.stderr


def test_the_console_scripts_are_functions_that_exist():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.keys() == {"rlhf", "rlhf-train"}
    for module, _, name in (target.partition(":") for target in scripts.values()):
        assert callable(getattr(import_module(module), name))


@pytest.mark.slow
def test_an_installed_wheel_brings_its_dials_along(rlhf_train, tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built, site = tmp_path / "built", tmp_path / "site"
    subprocess.run([*pip, "wheel", str(ROOT), "--no-deps", "-w", str(built)], check=True, timeout=110)
    (wheel,) = built.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=60)
    files = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").glob("**/*.yaml")}
    assert {path.relative_to(site / "rlhf/conf") for path in (site / "rlhf/conf").glob("**/*.yaml")} == files
    code = f"import rlhf.train as t; assert t.CONF.is_relative_to({str(site)!r}); t.main()"
    command = [sys.executable, "-c", code, "--cfg", "job", "experiment=smoke"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "prompts_per_step: 8" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "command", ["train", pytest.param("train mode=check", marks=pytest.mark.slow), "evaluate model.path=."]
)
def test_a_data_file_that_is_not_there_is_answered_before_anything_heavy_is_imported(command, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    module, *others = command.split()
    line = [sys.executable, "-m", f"rlhf.{module}", *others, "task=jsonl", "task.path=nowhere.jsonl"]
    environment = os.environ | WITHOUT_HEAVY | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"task.path: cannot read nowhere.jsonl from {tmp_path}: No such file or directory\n" in done.stderr
