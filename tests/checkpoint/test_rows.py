"""A run that goes on has the rows that it began with, or says which are others, and is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from rlhf.checkpoint.keeper import FOLDER, STATE
from rlhf.checkpoint.rows import check_rows, splits_of
from rlhf.checkpoint.store import MANIFEST, Store, described
from rlhf.config import JsonlTaskConfig, TinyModelConfig
from rlhf.models.policy import make_policy
from rlhf.models.saving import save_model
from rlhf.models.tokenizer import CHAT_TEMPLATE, make_tokenizer
from rlhf.run import run
from rlhf.shell.ending import RunError
from rlhf.tasks import RawTask, Row, make_task, read_task

LETTERS = "abcdefgh"
ROWS = [{"prompt": f"{a}{b}=", "chosen": b + a, "rejected": a + b, "hint": a} for a in "abcdef" for b in "gh"]


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def told(tmp_path):
    """`told(rows, seed=1)`: the splits of such a file, and the task."""

    def of(rows: list[dict], seed: int = 0, **dials):
        raw = read_task(JsonlTaskConfig(path=str(written(tmp_path / "rows", rows)), held_out=3, **dials), seed)
        tokenizer = make_tokenizer(TinyModelConfig(), [*LETTERS, "=", "!"], chat=False)
        task = make_task(raw, tokenizer)
        return splits_of(task, tokenizer), task

    return of


def other(place: int, **columns: str) -> list[dict]:
    return [row | columns if number == place else row for number, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("rows", "differ"),
    [
        (other(4, rejected="a!"), "preferences"),
        (other(4, chosen="b!"), "demonstrations preferences"),
        (other(4, hint="!"), "train"),
        (other(4, answer="b!"), "train demonstrations"),
    ],
)
def test_of_a_changed_row_the_splits_that_differ_are_named_and_the_first_row_in_each(told, rows, differ, tmp_path):
    before, task = told(ROWS)
    now, changed = told(rows)
    assert check_rows(before, told(ROWS)[0], task, allowed=False) == ""
    (row,) = [number for number, prompt in enumerate(changed.train, start=1) if prompt.text == rows[4]["prompt"]]
    place = f"{tmp_path / 'rows'}:5: '{rows[4]['prompt']}'"
    named = [f"{name} has 9 rows, and the first that differs is row {row} ({place})"
             for name in ("train", "demonstrations", "preferences") if name in differ]  # fmt: skip
    with pytest.raises(RunError, match="rows are not those that the run began with: ") as refused:
        check_rows(before, now, changed, allowed=False)
    said = str(refused.value)
    assert f"began with: {', '.join(named)}; go on with" in said and "\n" not in said
    assert "checkpoint.check_data=false" in said
    assert check_rows(before, now, changed, allowed=True) == f"warning: other rows from here on: {', '.join(named)}"


def test_another_order_of_the_lines_and_rows_that_are_gone_are_told_in_every_split(told):
    before, _ = told(ROWS)
    for rows, counts in ((ROWS[::-1], "train has 9 rows, and"), (ROWS[:-1], "train has 8 rows (were 9), and")):
        now, task = told(rows)
        with pytest.raises(RunError, match=rf"{counts.replace('(', '.').replace(')', '.')}.*held_out has 3 rows, and"):
            check_rows(before, now, task, allowed=False)


def test_rows_that_are_missing_at_the_end_or_new_there_are_found(told, tmp_path):
    before, task = told(ROWS)
    shorter = type(task)(task.train[:-2], task.held_out, task.demonstrations, task.preferences, task.gold)
    tokenizer = make_tokenizer(TinyModelConfig(), [*LETTERS, "=", "!"], chat=False)
    now = splits_of(shorter, tokenizer)
    said = check_rows(before, now, shorter, allowed=True)
    assert said.endswith(": train has 7 rows (were 9), and the first that differs is row 8 (no more)")
    said = check_rows(now, before, task, allowed=True)
    first = task.train[7]
    assert said.endswith(
        f"train has 9 rows (were 7), and the first that differs is row 8 ({first.where}: '{first.text}')"
    )
    assert first.where.startswith(f"{tmp_path / 'rows'}:")
    made = replace(first, where="")  # as of a task that comes from no file
    said = check_rows(now, before, replace(task, train=[*task.train[:7], made, *task.train[8:]]), allowed=True)
    assert said.endswith(f"is row 8 ('{first.text}')")


def test_at_most_six_bytes_of_a_row_are_kept():
    rows = [{"prompt": f"{number}=", "answer": str(number)} for number in range(300)]
    tokenizer = make_tokenizer(TinyModelConfig(), [*"0123456789="], chat=False)
    raw = RawTask([Row(row["prompt"], row) for row in rows], [Row("1=", {})], lambda *_: 0.0)
    splits = splits_of(make_task(raw, tokenizer), tokenizer)
    assert len(json.dumps(splits)) < 6 * 300 + 1000


# --- runs -------------------------------------------------------------------------------------------------------------

SMALL = ("experiment=smoke", "model=micro", "logger=jsonl", "transfer=local", "sft.steps=1", "prompts_per_step=2")
SHORT = ("task.held_out=3", "rollout.max_new_tokens=4", "checkpoint.every=1", "task=jsonl", "steps=1")


@pytest.fixture
def train(compose_run, tmp_path):
    """`train("steps=2", resume=True)`: the folder of a run on `rows.jsonl`, which is written first."""
    path = written(tmp_path / "rows.jsonl", [{"prompt": row["prompt"], "answer": row["chosen"]} for row in ROWS])

    def trained(*overrides: str, resume: bool = False) -> Path:
        run(compose_run(*SMALL, *SHORT, f"task.path={path}", *overrides), tmp_path / "run", overrides, resume)
        return tmp_path / "run"

    return trained


def test_a_resume_with_other_data_is_refused_before_workers_start_and_a_key_lets_it_go_on(train, tmp_path, capsys):
    folder = train()
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    with pytest.raises(RunError, match=r"^the task's rows are not those .*: train has 9 rows, and the first"):
        train("steps=2", "transfer=ipc", resume=True)
    assert not (folder / "worker-0.log").exists() and Store(folder / FOLDER).newest() == 1
    train("steps=2", "checkpoint.check_data=false", "logger=[console,jsonl]", resume=True)
    assert "warning: other rows from here on: train has 9 rows" in capsys.readouterr().out
    train("steps=3", resume=True)  # by now they are the run's
    assert Store(folder / FOLDER).newest() == 3


def test_a_checkpoint_from_before_there_were_such_notes_is_gone_on_from_which_is_said(train, capsys):
    folder = train()
    path = Store(folder / FOLDER).path(1)
    told = json.loads((path / STATE).read_text())
    assert {"rows", "moment"} < told["notes"].keys()
    told["notes"] = {"summary": told["notes"]["summary"]}
    (path / STATE).write_text(json.dumps(told))
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][STATE] = described(path / STATE)
    (path / MANIFEST).write_text(json.dumps(manifest))
    train("steps=2", "logger=[console,jsonl]", resume=True)
    assert "the checkpoint, an older one, does not say which rows it was trained on" in capsys.readouterr().out
    assert Store(folder / FOLDER).newest() == 2


def test_a_chat_template_with_the_date_says_the_day_on_which_the_run_began(train, tmp_path, compose_run):
    config = compose_run(*SMALL, "task=sort")
    tokenizer = make_tokenizer(config.model, [*LETTERS, *"=0123456789 "], chat=True)
    tokenizer.chat_template = CHAT_TEMPLATE + '{{ strftime_now("%S %f") }}'
    save_model(make_policy(config.model, tokenizer, 0), tokenizer, tmp_path / "model")
    asked = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["chosen"]} for row in ROWS]
    written(tmp_path / "rows.jsonl", asked)
    model = ("model=hf", f"model.path={tmp_path / 'model'}", "model.device=cpu")
    folder = train(*model)
    train(*model, "steps=2", resume=True)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {1, 2}
    assert len({row["prompt"][-9:] for row in samples}) == 1, "one moment in both processes' prompts"
    raw = read_task(JsonlTaskConfig(path=str(tmp_path / "rows.jsonl"), held_out=3), 0)
    task = make_task(raw, tokenizer, datetime(2026, 1, 2, 3, 4, 5, 678))
    assert all(prompt.text.endswith("05 000678") for prompt in task.train)
    now = {prompt.text[-6:] for prompt in make_task(raw, tokenizer).train}
    assert "000678" not in now, "and afterwards it is today again"
