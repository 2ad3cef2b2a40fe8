"""Rows as a run wants them asked: held out, named, behind a system message, with arguments of the template, short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_models import CHATML, THINKING, beginning_tokenizer, tokenizer_with

from rlhf.config import JsonlTaskConfig
from rlhf.tasks import make_task, read_task

SOURCE = {"role": "user", "content": "hello"}
OWN = {"role": "system", "content": "mine"}
ANSWER = {"role": "assistant", "content": "ab"}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(folder: Path, rows: list[dict], seed: int = 0, **options):
    return read_task(JsonlTaskConfig(path=write(folder / "rows.jsonl", rows), **{"held_out": 1} | options), seed)


def texts(folder: Path, rows: list[dict], chat_template: str = CHATML, **options) -> set[str]:
    task = make_task(read(folder, rows, **options), tokenizer_with(chat_template))
    return {prompt.text for prompt in [*task.train, *task.held_out]}


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns) + "<|im_start|>assistant\n"


# --- held-out rows of their own ---------------------------------------------------------------------------------------


def test_held_out_rows_come_from_a_file_of_their_own_and_are_not_trained_on(tmp_path):
    own = write(tmp_path / "own.jsonl", [{"prompt": f"t{n}"} for n in range(5)] + [{"prompt": "q3"}])
    raw = read(tmp_path, [{"prompt": f"q{n}"} for n in range(6)], held_out_path=own, held_out=64)
    assert {row.question for row in raw.held_out} == {"t0", "t1", "t2", "t3", "t4", "q3"}
    assert {row.question for row in raw.train} == {"q0", "q1", "q2", "q4", "q5"}
    assert raw.notes == [f"warning: rows whose prompt is one of {own} are not trained on: 1 ({tmp_path}/rows.jsonl:4)"]


def test_no_more_than_held_out_are_taken_of_them_which_depends_on_the_seed(tmp_path):
    own = write(tmp_path / "own.jsonl", [{"prompt": f"t{n}"} for n in range(50)])
    chosen = [
        [row.question for row in read(tmp_path, [{"prompt": "q"}], seed, held_out_path=own, held_out=4).held_out]
        for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2] and len(set(chosen[0])) == 4
    raw = read(tmp_path, [{"prompt": "q"}], held_out_path=own, held_out=4)
    assert raw.notes == [f"held out: 4 (task.held_out) of the 50 prompts of {own}"] and len(raw.train) == 1


def test_a_held_out_file_is_refused_by_its_own_key(tmp_path):
    rows = [{"prompt": "q0"}, {"prompt": "q1"}]
    with pytest.raises(ValueError, match=r"^task\.held_out_path: cannot read .*none\.jsonl from .*No such file"):
        read(tmp_path, rows, held_out_path=str(tmp_path / "none.jsonl"))
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty: task\.held_out_path must name a file"):
        read(tmp_path, rows, held_out_path=empty)
    bad = write(tmp_path / "bad.jsonl", [{"question": "t"}])
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: no column 'prompt'"):
        read(tmp_path, rows, held_out_path=bad)
    same = write(tmp_path / "same.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"every prompt of .* is held out by .*: set task\.held_out_path to other rows"
    ):
        read(tmp_path, rows, held_out_path=same)


# --- other names ------------------------------------------------------------------------------------------------------


def test_columns_are_taken_by_other_names_and_may_be_swapped(tmp_path):
    rows = [{"prompt": f"a{n}", "answer": f"b{n}", "level": n} for n in range(3)]
    raw = read(tmp_path, rows, columns={"prompt": "answer", "answer": "prompt", "hard": "level"})
    assert {(row.question, row.demonstration) for row in [*raw.train, *raw.held_out]} == {
        (f"b{n}", f"a{n}") for n in range(3)
    }
    assert raw.train[0].columns.keys() == {"answer", "hard"}


def test_a_name_that_no_column_has_is_one_line(tmp_path):
    with pytest.raises(ValueError) as error:
        read(tmp_path, [{"prompt": "a"}, {"prompt": "b"}], columns={"answer": "solution"})
    assert str(error.value) == (
        f"{tmp_path}/rows.jsonl:1: no column 'solution'; columns there: prompt; set task.columns to the right one "
        "(and so in all 2 lines)"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"columns": ["prompt"]}, "task.columns must be like {prompt: question, answer: solution} (got ['prompt'])"),
        ({"columns": {"prompt": 3}}, "task.columns must name columns of the data (got 3)"),
        ({"template": "no"}, "task.template must be like {enable_thinking: false} (got 'no')"),
        ({"longest_prompt": 0}, "task.longest_prompt must be at least 1 (got 0)"),
        ({"system": " "}, "task.system is empty: give it a text, or leave it out"),
    ],
)
def test_what_is_no_value_of_a_key_is_refused_where_it_is_declared(options, said):
    with pytest.raises(ValueError) as error:
        JsonlTaskConfig(path="rows.jsonl", **options)
    assert str(error.value) == said


# --- a system message, and texts as a user's --------------------------------------------------------------------------


def test_a_system_message_is_put_before_conversations_and_texts_and_a_rows_own_stays(tmp_path):
    rows = [
        {"prompt": [SOURCE], "answer": "ab"},
        {"messages": [SOURCE, ANSWER, {**SOURCE, "content": "again"}, ANSWER]},
        {"prompt": [OWN, SOURCE], "answer": "ab"},
        {"prompt": "a text", "chosen": "good", "rejected": "bad"},
    ]
    assert texts(tmp_path, rows, system="be brief") == {
        chatml(("system", "be brief"), ("user", "hello")),
        chatml(("system", "be brief"), ("user", "hello"), ("assistant", "ab"), ("user", "again")),
        chatml(("system", "mine"), ("user", "hello")),
        chatml(("system", "be brief"), ("user", "a text")),
    }
    raw = read(tmp_path, rows, system="be brief")
    assert raw.notes == [
        f"task.system is not put before conversations that have one of their own: 1 ({tmp_path}/rows.jsonl:3)"
    ]


def test_a_system_message_is_before_every_turn_that_is_learned(tmp_path):
    calls = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    row = {"messages": [SOURCE, calls, {"role": "tool", "content": "3"}, ANSWER]}
    raw = read(tmp_path, [row, {"prompt": "other"}], system="be brief")
    [row] = [row for row in [*raw.train, *raw.held_out] if row.turns]
    assert all(asked[0] == {"role": "system", "content": "be brief"} for asked in (row.question, row.turns[0][0]))


def test_texts_are_asked_as_a_users_message_where_the_task_says_so(tmp_path):
    rows = [{"prompt": "hello", "answer": "ab"}, {"prompt": "other", "answer": "c"}]
    assert texts(tmp_path, rows, chat=True) == {chatml(("user", "hello")), chatml(("user", "other"))}
    assert texts(tmp_path, rows) == {"hello", "other"}
    raw = read(tmp_path, rows, chat=True)
    assert {row.demonstration for row in [*raw.train, *raw.held_out]} == {"ab", "c"}


def test_a_model_without_a_chat_template_refuses_them_in_one_line(tmp_path):
    tokenizer = beginning_tokenizer()
    tokenizer.chat_template = None
    rows = [{"prompt": "hello"}, {"prompt": "other"}]
    for options in ({"system": "be brief"}, {"chat": True}):
        with pytest.raises(
            ValueError, match=r"no chat template: choose a chat model .*task\.system or task\.chat"
        ) as error:
            make_task(read(tmp_path, rows, **options), tokenizer)
        assert "\n" not in str(error.value)


# --- the template's arguments -----------------------------------------------------------------------------------------


def test_the_templates_arguments_are_every_rows_and_a_rows_own_win(tmp_path):
    rows = [
        {"prompt": [SOURCE]},
        {"prompt": [{**SOURCE, "content": "think"}], "chat_template_kwargs": {"enable_thinking": True}},
    ]
    thinks = "<think>\n\n</think>\n\n"
    options = {"template": {"enable_thinking": False}}
    assert texts(tmp_path, rows, THINKING, **options) == {chatml(("user", "hello")) + thinks, chatml(("user", "think"))}
    assert texts(tmp_path, [{"prompt": "a"}, {"prompt": "b"}], THINKING, chat=True, **options) == {
        chatml(("user", name)) + thinks for name in "ab"
    }


def test_arguments_that_the_template_does_not_use_are_said(tmp_path):
    raw = read(
        tmp_path, [{"prompt": [SOURCE]}, {"prompt": [{**SOURCE, "content": "b"}]}], template={"enable_thinkin": 0}
    )
    task = make_task(raw, tokenizer_with(THINKING))
    assert task.notes == ["warning: the model's chat template does not use 'enable_thinkin' of task.template"]


@pytest.mark.parametrize(
    ("prompt", "template", "said"),
    [
        (
            "a",
            {"enable_thinking": False},
            "task.template is for chat templates, and the prompts are texts: set task.chat",
        ),
        ([SOURCE], {"tokenize": True}, "task.template must not have tokenize: the harness gives that itself"),
    ],
)
def test_arguments_that_nothing_takes_are_refused_in_one_line(tmp_path, prompt, template, said):
    with pytest.raises(ValueError) as error:
        read(
            tmp_path,
            [{"prompt": prompt}, {"prompt": "other" if isinstance(prompt, str) else [OWN, SOURCE]}],
            template=template,
        )
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


# --- long prompts -----------------------------------------------------------------------------------------------------


def test_rows_with_longer_prompts_are_left_out_with_all_that_is_learned_of_them_and_counted(tmp_path):
    rows = [{"prompt": "a" * n, "chosen": "good", "rejected": "bad"} for n in range(1, 11)]
    raw = read(tmp_path, rows, longest_prompt=6, held_out=3, seed=2)
    task = make_task(raw, tokenizer_with(CHATML))
    lengths = [len(prompt.ids) for prompt in (*task.train, *task.held_out)]
    assert sorted(lengths) == [1, 2, 3, 4, 5, 6]
    assert len(task.preferences) == len(task.demonstrations) == len(task.train)
    held = 3 - len(task.held_out)
    assert 0 < held < 3
    [note] = task.notes
    assert note.startswith(f"task.longest_prompt=6 leaves out rows with longer prompts: 4 ({tmp_path}/rows.jsonl:")
    assert note.endswith(f", and 1 more), {held} of them held out")


def test_no_line_is_said_where_all_prompts_are_short_and_one_error_where_none_is(tmp_path):
    rows = [{"prompt": "a" * n} for n in range(4, 9)]
    assert not make_task(read(tmp_path, rows, longest_prompt=8), tokenizer_with(CHATML)).notes
    with pytest.raises(
        ValueError, match=r"^task\.longest_prompt=3 leaves no prompt to train on: the shortest has 4 tokens"
    ):
        make_task(read(tmp_path, rows, longest_prompt=3, seed=0, held_out=1), tokenizer_with(CHATML))
