"""Mistakes that show without a model are told before torch, and whatever else takes seconds, is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhf.preflight.before_torch import look
from rlhf.run import run

ROOT = Path(__file__).resolve().parents[2]
ABSENT = (
    "torch",
    "transformers",
    "ray",
    "matplotlib",
    "tensorboard",
    "numpy",
    "peft",
    "wandb",
    "reasoning_gym",
    "datasets",
)
SCRIPT = f"""\
import json, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
from composed import composed_evaluation, composed_run
from rlhf.preflight.before_torch import look
from rlhf.shell.ending import EXPLAINED

kinds = {{"config": composed_run, "evaluate": composed_evaluation}}
for line in sys.stdin:
    kind, *overrides = json.loads(line)
    try:
        said = repr(look(kinds[kind](*overrides)))
    except EXPLAINED as error:
        said = str(error)
    print(json.dumps(said))
"""
ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(100)]
FILES = {
    "good.jsonl": ROWS,
    "broken.jsonl": [*ROWS, '{"prompt": "1+1=", "answer": "2"'],
    "columns.jsonl": [{"question": "1+1=", "answer": "2"}] * 3,
    "types.jsonl": [*ROWS, {"prompt": 7, "answer": "2"}],
    "empty.jsonl": [],
    "alike.jsonl": [ROWS[0]] * 100,
    "few.jsonl": ROWS[:10],
    "table.csv": ["prompt,answer"],
    "roles.jsonl": [{"messages": [{"role": "human", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    "unanswered.jsonl": [{"messages": [{"role": "user", "content": "a"}]}],
    "pairs.jsonl": [{"prompt": "a", "chosen": "b"}],
    "prompts.jsonl": [{"prompt": row["prompt"]} for row in ROWS],
}
MISTAKES = {
    "task.path=nowhere.jsonl": "task.path: cannot read nowhere.jsonl from ",
    "task.path=broken.jsonl": "broken.jsonl:101: not JSON: ",
    "task.path=columns.jsonl": "columns.jsonl:1: no column 'prompt'; columns there: question, answer; set task.prompt",
    "task.path=types.jsonl": "types.jsonl:101: 'prompt' must be a text or a list of messages, not a number",
    "task.path=empty.jsonl": "empty.jsonl is empty: ",
    "task.path=alike.jsonl": "alike.jsonl has one prompt, and one at least is held out",
    "task.path=few.jsonl": "few.jsonl has 10 different prompts, too few to hold 64 out",
    "task.path=table.csv": "table.csv: that is csv: use task=hf",
    "task.path=roles.jsonl": "roles.jsonl:1: 'messages[0]' has the unknown role 'human'; known: ",
    "task.path=unanswered.jsonl": "unanswered.jsonl:1: 'messages' must hold a user's message before the assis",
    "task.path=pairs.jsonl": "pairs.jsonl:1: a preference needs both 'chosen' and 'rejected': 'rejected' is missing",
    "task.path=prompts.jsonl": "this task's data have no demonstrations to warm up on: set sft.steps=0",
    "task.path=prompts.jsonl sft.steps=0 algo=dpo": "algo=dpo needs chosen/rejected rows, or answers",
    "task.path=prompts.jsonl sft.steps=0 reward=verifier": "reward=verifier needs answers to compare with, and no row",
    "task.path=prompts.jsonl sft.steps=0 reward=model": "reward=model needs chosen/rejected rows, or answers",
    "task.path=good.jsonl prompts_per_step=50": "prompts_per_step must be at most the task's 36 training prompts",
    "task=hf task.path=good.jsonl": "task=hf needs the package datasets: pip install",
    "task=reasoning_gym task.name=chain_sum": "task=reasoning_gym needs the package reasoning-gym: pip install",
    "logger=[jsonl,wandb]": "logger=wandb needs the package wandb: pip install",
    "model.lora.rank=4": "model.lora.rank needs the package peft: pip install",
    "model=hf model.path=run": "model.path: cannot load a model from the folder run: it has no config.json, but run",
    "model=hf model.path=outputs/2030/policy": "model.path: cannot load a model: there is no folder outputs/2030/pol",
    "reward.path=./gone": "reward.path: cannot load a reward model: there is no folder ./gone",
    "reward=function reward.function=nothing:f": "reward.function=nothing:f cannot be imported, from the current",
    "reward=function reward.function=graded:LIMIT": "reward.function=graded:LIMIT must name a function (got int)",
    "reward=function reward.function=graded:by_level": "reward.function=graded:by_level is called as ",
    "reward=http reward.url=http://127.0.0.1:9/ reward.retries=0": "reward.url=http://127.0.0.1:9/",
    "evaluate task.path=prompts.jsonl": "no held-out row of the task has an answer to compare with: ",
    "evaluate model.path=run": "model.path: cannot load a model from the folder run: it has no config.json, but run",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What is said of each mistake, by a process in which importing anything heavy fails."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, rows in FILES.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    (folder / "graded.py").write_text("LIMIT = 3\n\n\ndef by_level(completions, level):\n    return [0.0]\n")
    (folder / "run" / "policy").mkdir(parents=True)
    (folder / "run" / "policy" / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input="".join(f"{json.dumps(command_of(mistake))}\n" for mistake in MISTAKES),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(MISTAKES, map(json.loads, done.stdout.splitlines()), strict=True))


def command_of(mistake: str) -> list[str]:
    """The kind of configuration, and its overrides."""
    words = mistake.split()
    kind = words.pop(0) if words[0] == "evaluate" else "config"
    data = ["task=jsonl"] if any(word.startswith("task.path=") for word in words) else []
    model = ["model.path=run/policy"] if kind == "evaluate" and "model.path=" not in mistake else []
    return [kind, *data, *model, *words]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_that_shows_without_a_model_is_told_before_torch(told, mistake):
    assert MISTAKES[mistake] in told[mistake]


def test_a_task_is_read_once_be_it_from_a_pipe(compose_run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    text = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    threading.Thread(target=(tmp_path / "pipe").write_text, args=[text], daemon=True).start()
    few = ("experiment=smoke", "transfer=local", "logger=jsonl", "steps=1", "sft.steps=1", "prompts_per_step=4")
    config = compose_run(*few, "reward=verifier", "task=jsonl", f"task.path={tmp_path / 'pipe'}")
    seen = look(config)
    assert run(config, tmp_path / "run", seen=seen)["steps"] == 1
    with pytest.raises(IndexError):
        seen.take()
