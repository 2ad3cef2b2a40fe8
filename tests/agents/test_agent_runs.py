"""Runs of task=agent: what they log, at lag 0 and in free order, and what they refuse before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.agents.task import agent_task
from rlhf.config.task import AgentTaskConfig
from rlhf.run import run

SMALL = (
    *("experiment=agent", "model=micro", "steps=2", "sft.steps=2", "prompts_per_step=2", "samples_per_prompt=2"),
    *("task.held_out=2", "logger=jsonl", "evaluate.samples=1"),
)
PLAYS = """
messages = row["prompt"]
for turn in range(2):
    said = ask(messages, max_tokens=2)
    messages += [said, {"role": "user", "content": "<"}]
reward(len(said["content"] or "") / 8)
"""


@pytest.fixture
def train(compose_run, tmp_path, script):
    """`train(override, ...)` runs such agents in this process; the folder."""

    def trained(*overrides: str) -> Path:
        path = Path(__file__).resolve().parents[2] / "examples" / "letters.jsonl"
        own = (f"task.path={path}", f"task.command='{script(PLAYS)}'", *overrides)
        run(compose_run(*SMALL, *own), tmp_path / "run", own)
        return tmp_path / "run"

    return trained


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_learns_from_what_agents_have_asked_and_counts_it(train):
    folder = train("transfer=local")
    steps = [row for row in lines(folder / "metrics.jsonl") if "train/loss" in row]
    assert len(steps) == 2 and all(row["train/mismatch"] < 1e-5 for row in steps)
    assert all(row["train/turns"] == 2 and row["agent/calls"] == 8 for row in steps)
    assert all(row["train/reward"] == row["train/gold"] for row in steps), "the session's reward is the task's own"
    samples = lines(folder / "samples.jsonl")
    assert all(len(row["conversation"]) == 3 and row["conversation"][1] == "<" for row in samples)


@pytest.mark.slow
@pytest.mark.lag(2)
def test_a_run_goes_on_over_worker_processes_in_free_order(train):
    folder = train("transfer=ipc", "rollout.ahead.lag=2", "rollout.ahead.order=free", "algo.correction=tis")
    steps = [row for row in lines(folder / "metrics.jsonl") if "train/loss" in row]
    assert len(steps) == 2 and all(row["train/turns"] == 2 for row in steps)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"command": "nobody-has-this --x"}, "task.command: there is no program 'nobody-has-this'"),
        ({"command": "python nowhere/agent.py"}, "task.command: there is no file 'nowhere/agent.py'"),
        ({"command": " "}, "task.command is empty"),
        ({"command": "python 'x"}, "task.command: No closing quotation"),
        ({"command": "python -V", "concurrency": 0}, "task.concurrency must be at least 1"),
        ({"command": "python -V", "timeout_s": 0.0}, "task.timeout_s must be"),
        ({"command": "python -V", "path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"command": "python -V", "host": "0.0.0.0", "tool_format": "hermetic"}, "task.tool_format must be one of"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(tmp_path, given, why):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": str(n), "answer": "a"}) + "\n" for n in range(4)))
    with pytest.raises(ValueError, match=why):
        agent_task(AgentTaskConfig(**{"path": str(rows), "held_out": 1, **given}), seed=0)
