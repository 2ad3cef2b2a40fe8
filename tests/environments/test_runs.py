"""Whole runs of task=environment: one turn is the plain task, and both examples begin to learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.run import run

SMALL = ("model=micro", "transfer=local", "logger=jsonl", "checkpoint.every=0", "evaluate_every=2", "steps=2")
ADD = "tests.environments.classes:add"


@pytest.fixture
def train(compose_run, tmp_path):
    """`train("steps=3", ..., name="a")` runs in this process; the folder."""

    def trained(*overrides: str, name: str = "run") -> Path:
        run(compose_run(*overrides), tmp_path / name, overrides)
        return tmp_path / name

    return trained


def rows_of(folder: Path) -> list[dict]:
    """What was logged, but for what depends on the clock."""
    clock = ("seconds/", "tokens_per_second", "transfer/", "tools/", "train/turns")
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if not name.startswith(clock)} for row in rows]


@pytest.mark.slow
def test_a_conversation_of_one_turn_has_the_metrics_of_the_plain_task_to_the_bit(train, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": [{"role": "user", "content": f"{a}+{b}"}], "answer": str(a + b)} for a in range(6) for b in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dials = (*SMALL, "reward=verifier", "sft.steps=4", "prompts_per_step=4", "rollout.max_new_tokens=4")
    same = (f"task.path={path}", "task.held_out=4")
    tools = (f"task.tools=[{ADD}]", "task.turns=1", "task.show_tools=false", "task.reply_tokens=8")
    # of the same characters and tags: what the tokenizer of a model made here has is what its task shows
    shown = {"tools": [], "unused": "".join(map(chr, range(32, 127)))}
    path.write_text("".join(json.dumps(row | shown) + "\n" for row in rows))
    ours = train("task=environment", *same, *tools, *dials, name="environment")
    from rlhf.tasks import raw

    wide = raw.RawTask.characters
    plain_tags = raw.RawTask.tags
    try:
        raw.RawTask.characters = lambda self: sorted(set(wide(self)) | set(raw.string.printable))
        raw.RawTask.tags = lambda self: sorted({*plain_tags(self), "tools", "tool_calls", "tool"})
        plain = train("task=jsonl", *same, *dials, name="plain")
    finally:
        raw.RawTask.characters, raw.RawTask.tags = wide, plain_tags
    assert rows_of(ours) == rows_of(plain)


@pytest.mark.slow
@pytest.mark.lag(2)
@pytest.mark.parametrize("order", ["lag=0", "order=free"])
def test_the_game_is_played_in_order_and_ahead(train, order):
    ahead = () if order == "lag=0" else ("rollout.ahead.lag=2", "rollout.ahead.order=free", "algo.correction=tis")
    few = ("experiment=number_line", "sft.steps=60", "prompts_per_step=8", "steps=4", "evaluate_every=4")
    folder = train(*few, *ahead, "transfer=local" if order == "lag=0" else "transfer.staging=arena", "logger=jsonl")
    rows = rows_of(folder)
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == 4 and all(0 <= row["train/reward"] <= 1 for row in steps)
    assert not any(name.startswith("environment/") for row in rows for name in row), "nothing has failed"
    said = [json.loads(line)["conversation"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert 5 <= max(map(len, said)) <= 7, "four answers at most, with observations between them"
