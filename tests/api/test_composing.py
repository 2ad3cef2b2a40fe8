"""`rlhf.compose` returns what the command line makes of the same words; a mistake is one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from composed import composed_run
from hydra.core.global_hydra import GlobalHydra

import rlhf

HEAVY = ("torch", "ray", "transformers", "matplotlib", "hydra")


def test_importing_the_package_and_its_names_takes_nothing_heavy():
    heavy = f"[each for each in {HEAVY} if each in sys.modules]"
    code = f"import sys, rlhf; first = {heavy}; from rlhf import Result, RunConfig, RunError, compose, train; "
    code += f"print(first, [each for each in {heavy} if each != 'hydra'])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout.split("\n")[0] == "[] []"


def test_the_names_are_functions_also_once_the_modules_of_these_names_are_imported():
    code = "import rlhf, rlhf.train, rlhf.compose; print(rlhf.compose(['steps=3']).steps); rlhf.train(3)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "3\n"
    assert ended.stderr.endswith("ValueError: config= must be what rlhf.compose(...) returns (got int)\n")


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = rlhf.trian
    assert {"compose", "train", "RunConfig"} <= set(dir(rlhf))


def test_it_is_the_run_of_the_command_line():
    words = ["experiment=smoke", "algo=rloo", "task=reverse", "steps=5"]
    assert rlhf.compose(words) == composed_run(*words)


def test_keywords_are_words():
    words = ["experiment=smoke", "algo=rloo", "steps=5", "optim.lr=0.0001", "task.letters=4", "reward.max_failed=1.0"]
    words += ["model.lora.target=[q_proj]", "model.lora.rank=2", "profile.steps=[1,2]", "checkpoint.keep_best=false"]
    dials = {"optim": {"lr": 1e-4}, "task": {"letters": 4}, "reward": {"max_failed": 1.0}, "profile": {"steps": [1, 2]}}
    dials |= {"model": {"lora": {"target": ("q_proj",), "rank": 2}}, "checkpoint": {"keep_best": False}}
    assert rlhf.compose(["experiment=smoke"], algo="rloo", steps=5, **dials) == composed_run(*words)


@pytest.mark.parametrize("text", ["Be brief: it's {x}, [y]", "back\\slash\\", "a=b", "1"])
def test_any_text_can_be_a_value(text):
    assert rlhf.compose(task="given").task.system is None
    assert rlhf.compose(["task=given"], task={"system": text}).task.system == text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["steps=0"], "steps must be at least 1 (got 0)"),
        (
            ["stepz=5"],
            "Could not override 'stepz'. To append to your config use +stepz=5; Key 'stepz' not in 'RunConfig'",
        ),
        (["steps=x"], "Error merging override steps=x; Value 'x' of type 'str' could not be converted to Integer"),
        (["task=jsonl"], "task.path has no value: add task.path=..."),
        (["transfer=nope"], "In 'config': Could not find 'transfer/nope' Available options in 'transfer': disk gloo"),
        (["model.path=x"], "that key belongs to the hf model: model.path needs model=hf"),
        (["logger=[a]"], "logger=[a]: there is no logger=a; choose from console, jsonl"),
        (["plugins=[none_such]"], "plugins: none_such cannot be imported"),
        (["steps=1,2"], "Ambiguous value for argument 'steps=1,2'"),
        (["--cfg"], "--cfg is a flag of the command line: compose takes words like steps=5"),
    ],
)
def test_a_mistake_is_a_value_error_of_one_line_and_nothing_is_printed(words, said, capfd):
    with pytest.raises(ValueError) as error:
        rlhf.compose(words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_value_that_no_dial_has_is_named():
    with pytest.raises(ValueError, match=r"a dial is a number, text, list or dict, .* \(got <object"):
        rlhf.compose(steps=object())


def test_a_program_s_own_hydra_stays_as_it_is():
    held = GlobalHydra.instance()
    before, held.hydra = held.hydra, (own := object())
    try:
        assert rlhf.compose(["steps=2"]).steps == 2
        with pytest.raises(ValueError, match="steps"):
            rlhf.compose(["steps=0"])
        assert GlobalHydra.instance().hydra is own
    finally:
        GlobalHydra.instance().hydra = before
