"""`rlhf COMMAND` is the module of that command, and `rlhf` alone says which there are."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from forked import FRESH

from rlhf import __version__
from rlhf.__main__ import COMMANDS, main

ALONE = """\
import sys
from rlhf.__main__ import main
before = set(sys.modules)
main(sys.argv[1:])
print({name.partition(".")[0] for name in set(sys.modules) - before | {"rlhf"}}, file=sys.stderr)
"""


def ran(*arguments: str, folder=None, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    env = os.environ | {"COLUMNS": "100", FRESH: "1"} | variables
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("asked", [[], ["--help"], ["-h"]])
def test_alone_it_lists_every_command_in_a_line_and_imports_nothing_for_it(asked):
    done = ran("-c", ALONE, *asked)
    told = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("  rlhf ")}
    assert told.keys() == COMMANDS.keys() and all(len(line) <= 80 for line in told.values())
    assert done.stderr.strip() == "{'rlhf'}"


def test_every_command_is_a_module_that_can_be_run():
    for module, _ in COMMANDS.values():
        spec = find_spec(module)
        assert spec is not None and (spec.submodule_search_locations is None or find_spec(f"{module}.__main__"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_its_module_with_the_same_arguments_in_the_same_process(name, monkeypatch):
    become = []
    monkeypatch.setattr(os, "execv", lambda *told: become.append(told))
    main([name, "-m", "seed=0,1", "--help", "a b"])
    [(program, line)] = become
    assert program == line[0] == sys.executable
    assert line[-6:] == ["-m", COMMANDS[name][0], "-m", "seed=0,1", "--help", "a b"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("train", ["--cfg", "job", "algo=rloo", "seed=3"], marks=pytest.mark.slow),
        ("train", ["algo=nothing"]),
        ("report", ["nowhere"]),
    ],
)
def test_output_and_exit_code_are_those_of_the_module(tmp_path, name, arguments):
    ours, module = (
        ran("-W", "ignore", *way, *arguments, folder=tmp_path, PYTHONPATH=os.pathsep.join(sys.path))
        for way in (("-m", "rlhf", name), ("-m", COMMANDS[name][0]))
    )
    assert (ours.returncode, ours.stdout, ours.stderr) == (module.returncode, module.stdout, module.stderr)
    assert ours.stdout or ours.stderr


def test_an_unknown_command_is_one_line_that_says_which_there_are(capsys):
    with pytest.raises(SystemExit) as end:
        main(["algo=rloo"])
    told = "train, resume, scale, evaluate, report, sweep, doctor, bench"
    assert end.value.code == 2
    assert capsys.readouterr().err == f"rlhf: there is no command 'algo=rloo': choose from {told}\n"


@pytest.mark.parametrize("module", ["rlhf.__main__", "rlhf.train", "rlhf.evaluate", "rlhf.resume"])
def test_the_version_is_ours(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--version"])
    __import__(module, fromlist=["main"]).main()
    assert capsys.readouterr().out == f"rlhf {__version__}\n"
