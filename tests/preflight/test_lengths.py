"""Rows beyond the model's context, and files that lack what a stage needs: said by row before anything starts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from rlhf.check import check_run
from rlhf.config import HfModelConfig
from rlhf.models.tokenizer import make_tokenizer
from rlhf.run import run

SMALL = (
    "experiment=smoke",
    "transfer=local",
    "logger=[console,jsonl]",
    "task=jsonl",
    "task.held_out=1",
    "model.context=32",
)
DIALS = ("rollout.max_new_tokens=4", "steps=1", "prompts_per_step=2", "sft.steps=1")
OWN = ("reward=function", "reward.function=examples.reward_functions:brevity")
LONG = "a" * 40
ANSWERS = [{"prompt": f"q{n}", "answer": LONG if n in (3, 5) else "b"} for n in range(8)]
PAIRS = [{"prompt": f"q{n}", "chosen": LONG if n == 3 else "b", "rejected": LONG if n == 5 else "c"} for n in range(8)]
PROMPTS = [{"prompt": f"q{n}" + (LONG if n in (3, 5) else "")} for n in range(8)]
MODES = pytest.mark.parametrize("start", [run, check_run], ids=["train", "check"])


@pytest.fixture
def config_of(compose_run, tmp_path):
    """`config_of(rows, "sft.steps=0", ...) -> RunConfig` on a file of these rows."""

    def composed(rows: list[dict], *overrides: str):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return compose_run(*SMALL, *DIALS, f"task.path={path}", *overrides)

    return composed


def refusal(start, config, folder: Path) -> str:
    """What is said, when nothing is trained."""
    with pytest.raises(ValueError) as error:
        start(config, folder / "run")
    assert not list(folder.rglob("metrics.jsonl")) and not list(folder.rglob("policy"))
    return str(error.value).replace(str(folder) + "/", "")


@MODES
def test_overlong_demonstrations_are_refused_by_row(config_of, tmp_path, start):
    assert refusal(start, config_of(ANSWERS), tmp_path) == (
        "longer than the model's context of 32 tokens are 2 of 7 demonstrations: rows.jsonl:4 (43 tokens), "
        "rows.jsonl:6 (43 tokens): set task.overlong=drop to leave those rows out, take a model with a longer context "
        "(model.context), or set sft.steps=0"
    )


@MODES
@pytest.mark.parametrize("learner", [("algo=dpo",), ("reward=model",)], ids=["DPO", "reward model"])
def test_overlong_pairs_are_refused_by_row_whichever_side_is_long(config_of, tmp_path, start, learner):
    said = refusal(start, config_of(PAIRS, *learner, "sft.steps=0"), tmp_path)
    assert "2 of 7 preference pairs: rows.jsonl:4 (43 tokens), rows.jsonl:6 (43 tokens): set task.overlong=drop" in said


def test_what_is_too_long_is_said_once_and_not_by_transformers_too(config_of, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [listening := logging.Handler()])
    monkeypatch.setattr(listening, "emit", lambda record: heard.append(record.getMessage()))
    run(config_of(ANSWERS, "task.overlong=drop"), tmp_path / "run")
    loaded = make_tokenizer(HfModelConfig(path=str(tmp_path / "run" / "policy")), "", chat=False)
    assert len(loaded.encode(LONG)) > loaded.model_max_length == 32
    assert not heard


@MODES
def test_overlong_prompts_are_refused_by_row(config_of, tmp_path, start):
    said = refusal(start, config_of(PROMPTS, *OWN, "sft.steps=0"), tmp_path)
    assert said == (
        "the longest prompt (42 tokens, rows.jsonl:4) and rollout.max_new_tokens (4) do not fit the model's context of "
        "32 tokens: lower rollout.max_new_tokens, or take a model with a longer context (model.context); too long are "
        "2 of 8 prompts: rows.jsonl:4 (42 tokens), rows.jsonl:6 (42 tokens); task.overlong=drop leaves them out"
    )


def test_of_many_overlong_rows_the_longest_are_named_and_the_others_counted(config_of, tmp_path):
    rows = [{"prompt": f"q{n}", "answer": "a" * (30 + n)} for n in range(10)]
    said = refusal(run, config_of(rows, "seed=1"), tmp_path)
    assert "9 of 9 demonstrations: " in said and said.count("rows.jsonl:") == 3 and ", and 6 more: set" in said


@pytest.mark.slow
def test_what_no_stage_learns_from_may_be_longer_than_the_context(config_of, tmp_path):
    run(config_of(ANSWERS, *OWN, "sft.steps=0"), tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "overrides", "told"),
    [
        (ANSWERS, (), "leaves out what has more than 32 tokens: 2 of 7 demonstrations: "),
        (PAIRS, ("algo=dpo", "sft.steps=0"), "leaves out what has more than 32 tokens: 2 of 7 preference pairs: "),
        (PROMPTS, (*OWN, "sft.steps=0"), "leaves out what has more than 28 tokens: 2 of 8 prompts: "),
    ],
    ids=["demonstrations", "pairs", "prompts"],
)
def test_overlong_rows_are_left_out_on_request_and_counted_on_the_screen(
    config_of, tmp_path_factory, capsys, rows, overrides, told
):
    folder = tmp_path_factory.mktemp("drop")  # not tmp_path, whose journals must have samples, which DPO need not take
    run(config_of(rows, "task.overlong=drop", *overrides), folder / "run")
    said = capsys.readouterr().out
    assert f"warning: task.overlong=drop {told}" in said and "rows.jsonl:4 (4" in said and "rows.jsonl:6 (4" in said
    assert (folder / "run" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "overrides", "said"),
    [
        ([{**row, "answer": LONG} for row in ANSWERS], (), "no demonstrations to warm up on: set sft.steps=0"),
        ([{**row, "chosen": LONG} for row in PAIRS], ("algo=dpo", "sft.steps=0"), "needs chosen/rejected rows"),
        (PROMPTS, (*OWN, "sft.steps=0", "prompts_per_step=6"), "at most the task's 5 training prompts (got 6)"),
        ([{"prompt": LONG + str(n)} for n in range(4)], (*OWN, "sft.steps=0"), "at most the task's 0 training prompts"),
    ],
)
def test_a_file_of_which_too_little_is_left_is_refused(config_of, tmp_path, rows, overrides, said):
    assert said in refusal(run, config_of(rows, "task.overlong=drop", *overrides), tmp_path)


def test_a_file_of_prompts_alone_is_enough_for_a_reward_of_ones_own(config_of, tmp_path):
    check_run(config_of([{"prompt": f"q{n}"} for n in range(8)], *OWN, "sft.steps=0"), tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (OWN, "no demonstrations to warm up on: set sft.steps=0"),
        (("reward=verifier", "sft.steps=0"), "reward=verifier needs answers to compare with, and no row has one"),
        (("reward=model", "sft.steps=0"), "reward=model needs chosen/rejected rows, or answers"),
        (("algo=dpo", "sft.steps=0"), "algo=dpo needs chosen/rejected rows, or answers"),
    ],
)
def test_what_a_file_of_prompts_alone_lacks_is_one_line(config_of, tmp_path, overrides, said):
    assert said in refusal(check_run, config_of([{"prompt": f"q{n}"} for n in range(8)], *overrides), tmp_path)


@MODES
def test_a_file_of_fewer_pairs_than_a_step_takes_is_refused_before_the_warm_up(config_of, tmp_path, start):
    rows = [{"prompt": f"q{n}", "chosen": "b", "rejected": "c"} for n in range(8)]
    said = refusal(start, config_of(rows, "algo=dpo", "algo.held_out=0.0", "prompts_per_step=8"), tmp_path)
    assert said.startswith("a step takes prompts_per_step=8 pairs, and there are 7 to train on: lower it")


def test_pairs_of_equal_answers_are_left_out_and_counted_on_the_screen(config_of, tmp_path, tmp_path_factory, capsys):
    rows = [{"prompt": f"q{n}", "chosen": "b", "rejected": "b" if n in (3, 5) else "c"} for n in range(8)]
    check_run(config_of(rows, "algo=dpo", "sft.steps=0"), tmp_path_factory.mktemp("dpo") / "run")
    told = f"are left out: 2 ({tmp_path}/rows.jsonl:4, {tmp_path}/rows.jsonl:6)"
    assert f"warning: pairs whose chosen and rejected answers are the same {told}" in capsys.readouterr().out
