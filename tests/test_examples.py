"""The shipped examples: the files are what their script writes, the harness reads them, the commands compose."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config import Device, JsonlTaskConfig, TinyModelConfig
from rlhf.models.tokenizer import make_tokenizer
from rlhf.rewards import FunctionReward
from rlhf.tasks import make_task, read_task
from rlhf.types import Prompt

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def read(name: str):
    """The task of an example file, and its tokenizer."""
    raw = read_task(JsonlTaskConfig(path=str(EXAMPLES / name)), seed=0)
    tokenizer = make_tokenizer(TinyModelConfig(device=Device.cpu), raw.characters(), raw.conversational)
    return make_task(raw, tokenizer), tokenizer


def test_the_script_writes_the_files_that_are_shipped(tmp_path):
    subprocess.run([sys.executable, EXAMPLES / "make_preferences.py", tmp_path], check=True, timeout=60)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shipped = {path.name: path.read_bytes() for path in EXAMPLES.glob("*.jsonl")}
    del shipped["letters.jsonl"]  # of the agent, and made by nobody
    assert written == shipped


def test_the_preferences_are_many_different_and_short():
    rows = [json.loads(line) for line in (EXAMPLES / "preferences.jsonl").read_text(encoding="ascii").splitlines()]
    assert len(rows) >= 200
    assert len({(row["prompt"], row["rejected"]) for row in rows}) == len(rows)
    assert len({row["prompt"] for row in rows}) >= 150
    assert max(len(text) for row in rows for text in (row["chosen"], row["rejected"])) <= 60


def test_the_preferences_are_read_as_pairs():
    task, tokenizer = read("preferences.jsonl")
    assert len(task.held_out) == 64
    assert len(task.preferences) == len(task.demonstrations) == len(task.train) > 200
    assert all(tokenizer.unk_token_id not in prompt.ids for prompt in [*task.train, *task.held_out])
    assert set(task.train[0].columns) == {"topic"}


def test_the_answers_are_read_with_a_reference():
    task, _ = read("answers.jsonl")
    assert len(task.train) > 64
    assert all(task.score(prompt, answer) == 1.0 for prompt, answer in task.demonstrations)
    assert all(task.score(prompt, "no") == 0.0 for prompt in task.held_out)


def test_the_conversations_are_read_with_role_tags():
    task, tokenizer = read("conversations.jsonl")
    assert len(task.train) >= 60
    tags = set(tokenizer.convert_tokens_to_ids(["<|system|>", "<|user|>", "<|assistant|>"]))
    for prompt, answer in task.demonstrations:
        assert prompt.text.startswith("<|system|>")
        assert prompt.ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
        assert len(tags & set(prompt.ids)) == 3
        assert "<|" not in answer


def test_brevity_prefers_the_shorter_answer_and_nothing_least():
    reward = FunctionReward("examples.reward_functions:brevity")
    answers = ["Yes.", "Yes, of course, gladly.", "x" * 500, "", "  "]
    short, longer, *others = reward([Prompt("Can I?", (1,), {"topic": "shop"})] * 5, answers)
    assert short > longer > 0.0
    assert others == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("command", re.findall(r"`python -m rlhf\.train (.*?)`", (EXAMPLES / "README.md").read_text()))
def test_every_command_of_the_readme_composes_and_names_a_shipped_file(compose_run, command):
    run = compose_run(*shlex.split(command))
    named = run.task.path or f"{run.task.factory.partition(':')[0].replace('.', '/')}.py"
    assert (EXAMPLES.parent / named).is_file()


def test_the_readme_has_a_command_for_every_file():
    text = (EXAMPLES / "README.md").read_text()
    assert all(path.name in text for path in EXAMPLES.glob("*.jsonl"))


@pytest.mark.slow
def test_the_script_trains_twice_and_needs_no_guard_around_its_runs(tmp_path):
    """Whose workers are processes that import nothing of it."""
    command = [sys.executable, EXAMPLES / "train_from_python.py", tmp_path / "runs"]
    variables = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    told = subprocess.run(command, cwd=tmp_path, env=variables, timeout=110, check=True, capture_output=True, text=True)
    assert told.stdout.count("run finished, 30 steps") == told.stdout.count("reward (trained on)") == 2
    assert "dbca= -> " in told.stdout
    assert (tmp_path / "runs" / "second" / "policy" / "model.safetensors").is_file()
