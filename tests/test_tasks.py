"""Tasks: procedural ones, JSON-lines files in every form, and what is said of a bad file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import ArithmeticTaskConfig, JsonlTaskConfig, ReverseTaskConfig, SortTaskConfig
from rlhf.tasks import Row, make_task, read_task


class CodepointTokenizer:
    """One id a character; its chat template is the roles' first letters."""

    eos_token_id = 1
    pad_token_id = 0
    chat_template: str | None = "roles"

    def encode(self, text, add_special_tokens=True):
        return [ord(character) for character in text] + ([1] if add_special_tokens else [])

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"[{turn['role'][0]}]{turn['content']}" for turn in conversation) + "[a]"


TOKENIZER = CodepointTokenizer()
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
RUDE = {"role": "assistant", "content": "What"}


def write(folder: Path, rows: list) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read_rows(folder: Path, rows: list, **options) -> list[Row]:
    """Every row of a file, in the order of the file; one more line is added to be held out."""
    extra = {**rows[0], "prompt": "held out"} if "prompt" in rows[0] else {"prompt": "held out"}
    raw = read_task(JsonlTaskConfig(path=write(folder, [*rows, extra]), held_out=1, **options), seed=0)
    return [*raw.train, *raw.held_out]


def find(rows: list[Row], question: object) -> Row:
    return next(row for row in rows if row.question == question)


# --- procedural -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (SortTaskConfig(demonstration_errors=0.0), lambda text: "".join(sorted(text))),
        (ReverseTaskConfig(demonstration_errors=0.0), lambda text: text[::-1]),
        (ArithmeticTaskConfig(operators="+-*"), lambda text: str(eval(text))),  # noqa: S307
    ],
)
def test_every_demonstration_is_the_right_answer_and_scores_one(config, rule):
    task = make_task(read_task(config, seed=3), TOKENIZER)
    assert len(task.demonstrations) == len(task.train)
    for prompt, answer in task.demonstrations[:300]:
        assert prompt.text.endswith("=")
        assert answer == rule(prompt.text[:-1])
        assert task.score(prompt, answer) == 1.0


def test_demonstrations_err_at_the_rate_told_and_the_gold_score_does_not():
    task = make_task(read_task(SortTaskConfig(letters=20, demonstration_errors=0.3), seed=0), TOKENIZER)
    shares = [task.score(prompt, answer) for prompt, answer in task.demonstrations]
    assert abs(sum(shares) / len(shares) - (1 - 0.3 * 19 / 20)) < 0.02  # one wrong draw in 20 is right by chance
    assert all(task.score(prompt, "".join(sorted(prompt.text[:-1]))) == 1.0 for prompt in task.train[:300])


def test_held_out_prompts_are_never_trained_on():
    for config in (SortTaskConfig(held_out=100, letters=3), ReverseTaskConfig(), ArithmeticTaskConfig(held_out=400)):
        task = make_task(read_task(config, seed=1), TOKENIZER)
        held_out, train = {prompt.text for prompt in task.held_out}, {prompt.text for prompt in task.train}
        assert len(held_out) == len(task.held_out) == config.held_out
        assert len(train) == len(task.train)
        assert not held_out & train


def test_a_seed_gives_the_same_prompts_and_another_seed_gives_others():
    assert read_task(SortTaskConfig(), 0) == read_task(SortTaskConfig(), 0)
    assert read_task(SortTaskConfig(), 0).train != read_task(SortTaskConfig(), 1).train


def test_held_out_prompts_have_the_lengths_of_training_prompts():
    raw = read_task(SortTaskConfig(letters=4, min_length=1, max_length=8, held_out=200, prompts=800), 0)
    assert {len(row.question) for row in raw.held_out} == {len(row.question) for row in raw.train}


def test_a_wrong_sequence_gets_the_share_of_its_right_positions():
    raw = read_task(SortTaskConfig(), 0)
    columns = {"answer": "abcd"}
    scores = {"abcd": 1.0, " abcd\n": 1.0, "abdc": 0.5, "abc": 0.75, "abcdabcd": 0.5, "": 0.0, "dddd": 0.25}
    assert {answer: raw.gold(columns, answer) for answer in scores} == scores


def test_arithmetic_has_no_partial_credit():
    raw = read_task(ArithmeticTaskConfig(), 0)
    assert [raw.gold({"answer": "19"}, answer) for answer in ("19", "18", "1", "")] == [1.0, 0.0, 0.0, 0.0]


def test_no_more_prompts_are_made_than_asked_for_or_than_there_are():
    assert len(read_task(SortTaskConfig(prompts=10), 0).train) == 10
    tiny = SortTaskConfig(letters=2, min_length=1, max_length=2, held_out=2)  # a, b, aa, ab, ba, bb
    assert len(read_task(tiny, 0).train) == 4


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (
            SortTaskConfig(letters=2, max_length=3, held_out=8),
            ["task.held_out", "task.letters", "task.max_length", "8"],
        ),
        (ArithmeticTaskConfig(max_number=1, held_out=9), ["task.held_out", "task.max_number", "task.operators", "8"]),
    ],
)
def test_too_few_distinct_prompts_name_the_keys_to_change(config, keys):
    with pytest.raises(ValueError) as error:
        read_task(config, 0)
    assert all(key in str(error.value) for key in keys)


def test_the_characters_are_those_of_prompts_and_answers():
    assert read_task(ArithmeticTaskConfig(), 0).characters() == sorted("0123456789+-=")


# --- JSON lines: the forms --------------------------------------------------------------------------------------------


def test_an_answer_is_a_demonstration_and_a_reference(tmp_path):
    row = {"prompt": "2+2=", "answer": "4", "level": 3, "tags": ["easy"]}
    raw = read_task(JsonlTaskConfig(path=write(tmp_path, [row, {**row, "prompt": "1+3="}]), held_out=1), 0)
    task = make_task(raw, TOKENIZER)
    [(prompt, answer)] = task.demonstrations
    assert answer == "4"
    assert prompt.columns == {"answer": "4", "level": 3, "tags": ["easy"]}
    assert prompt.ids == tuple(map(ord, prompt.text))
    assert [task.score(prompt, text) for text in ("4", " 4\n", "5", "44")] == [1.0, 1.0, 0.0, 0.0]
    assert not task.preferences


def test_columns_can_have_other_names(tmp_path):
    rows = [{"question": f"{number}?", "solution": str(number)} for number in range(3)]
    config = JsonlTaskConfig(path=write(tmp_path, rows), held_out=1, prompt_column="question", answer_column="solution")
    task = make_task(read_task(config, 0), TOKENIZER)
    assert {(prompt.text, answer) for prompt, answer in task.demonstrations} < {("0?", "0"), ("1?", "1"), ("2?", "2")}
    assert task.score(task.train[0], task.train[0].text[0]) == 1.0


def test_a_preference_has_the_chosen_answer_as_demonstration_and_no_reference(tmp_path):
    rows = [{"prompt": f"q{number}", "chosen": "yes", "rejected": "no"} for number in range(3)]
    task = make_task(read_task(JsonlTaskConfig(path=write(tmp_path, rows), held_out=1), 0), TOKENIZER)
    assert len(task.preferences) == len(task.demonstrations) == len(task.train) == 2
    assert (task.preferences[0].prompt, task.preferences[0].chosen, task.preferences[0].rejected) == (
        task.train[0],
        "yes",
        "no",
    )
    assert task.demonstrations[0] == (task.train[0], "yes")
    assert task.score(task.train[0], "yes") is None


def test_the_last_assistant_message_is_the_demonstration(tmp_path):
    system = {"role": "system", "content": "Be kind"}
    rows = [{"messages": [system, USER, ASSISTANT, {"role": "user", "content": "Bye"}, RUDE], "source": "web"}]
    row = find(read_rows(tmp_path, rows), [system, USER, ASSISTANT, {"role": "user", "content": "Bye"}])
    assert row.demonstration == "What"
    assert row.columns == {"source": "web"}


def test_conversations_are_rendered_by_the_chat_template(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Hi {number}"}, ASSISTANT]} for number in range(2)]
    raw = read_task(JsonlTaskConfig(path=write(tmp_path, rows), held_out=1), 0)
    assert raw.conversational
    assert raw.characters() == sorted(set("Hi 01Hello"))
    task = make_task(raw, TOKENIZER)
    assert {task.train[0].text, task.held_out[0].text} == {"[u]Hi 0[a]", "[u]Hi 1[a]"}
    assert task.train[0].ids == tuple(map(ord, task.train[0].text))
    assert task.demonstrations == [(task.train[0], "Hello")]
    contents = {prompt.text: prompt.messages[-1]["content"] for prompt in (*task.train, *task.held_out)}
    assert contents == {"[u]Hi 0[a]": "Hi 0", "[u]Hi 1[a]": "Hi 1"}, "rewards with templates of their own need them"


def test_conversations_without_a_chat_template_are_refused(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Hi {number}"}, ASSISTANT]} for number in range(2)]
    raw = read_task(JsonlTaskConfig(path=write(tmp_path, rows), held_out=1), 0)
    plain = CodepointTokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match=r"chat template.*model\.path.*task\.path"):
        make_task(raw, plain)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [RUDE]},
        {"prompt": [USER], "chosen": "Hello", "rejected": "What"},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, RUDE]},
        {"prompt": "Hi", "chosen": [USER, ASSISTANT], "rejected": [USER, RUDE], "messages": [USER, ASSISTANT]},
        {"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": [USER, RUDE]},
    ],
    ids=["explicit", "texts", "implicit", "prompt repeated as text", "prompt repeated as messages"],
)
def test_a_conversational_preference_is_read_in_each_of_its_forms(tmp_path, row):
    raw = read_task(JsonlTaskConfig(path=write(tmp_path, [row, {"prompt": "held out"}]), held_out=1), 0)
    parsed = find([*raw.train, *raw.held_out], [USER])
    assert parsed.preference == ("Hello", "What")
    assert parsed.demonstration == "Hello"
    assert parsed.columns == {}


def test_an_implicit_prompt_is_all_that_both_conversations_share(tmp_path):
    again = {"role": "user", "content": "And you?"}
    row = {"chosen": [USER, ASSISTANT, again, ASSISTANT], "rejected": [USER, ASSISTANT, again, RUDE]}
    assert find(read_rows(tmp_path, [row]), [USER, ASSISTANT, again]).preference == ("Hello", "What")


def test_a_prompt_alone_is_enough_for_a_reward_that_needs_no_reference(tmp_path):
    row = find(read_rows(tmp_path, [{"prompt": "Tell me a joke", "theme": "cats"}]), "Tell me a joke")
    assert row.demonstration is None
    assert row.columns == {"theme": "cats"}


def test_rows_of_one_question_stay_on_one_side_of_the_split(tmp_path):
    rows = [{"prompt": f"q{n % 10}", "chosen": f"good {n}", "rejected": "bad"} for n in range(40)]
    for seed in range(5):
        raw = read_task(JsonlTaskConfig(path=write(tmp_path, rows), held_out=4), seed)
        held_out = {row.question for row in raw.held_out}
        assert len(held_out) == len(raw.held_out) == 4
        assert len(raw.train) == 24
        assert not held_out & {row.question for row in raw.train}


def test_blank_lines_byte_order_mark_and_windows_line_ends_are_no_errors(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes("\ufeff".encode() + b'{"prompt": "a", "answer": "b"}\r\n\r\n{"prompt": "c", "answer": "d"}\r\n')
    raw = read_task(JsonlTaskConfig(path=str(path), held_out=1), 0)
    assert {raw.train[0].question, raw.held_out[0].question} == {"a", "c"}


# --- JSON lines: what is said of a bad file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object, not an array"),
        ("7", "must be a JSON object, not a number"),
        ('{"prompt": "a\\ud800", "answer": "b"}', "not UTF-8"),
        ({"question": "a"}, "no column 'prompt'; columns there: question; set task.prompt_column"),
        ({"prompt": 7, "answer": "b"}, "'prompt' must be a text or a list of messages, not a number"),
        ({"prompt": "", "answer": "b"}, "'prompt' is empty"),
        ({"prompt": "a", "answer": True}, "'answer' must be a text or a list of one assistant message, not true"),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are the same"),
        (
            {"prompt": "a", "chosen": "b", "rejected": {}},
            "'rejected' must be a text or a list of one assistant message",
        ),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "are the same"),
        ({"chosen": [USER, ASSISTANT, USER], "rejected": [USER, RUDE]}, "exactly one assistant message"),
        ({"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "No"}, RUDE]}, "'chosen' must hold a user's"),
        ({"messages": []}, "'messages' must hold a user's message"),
        ({"messages": [ASSISTANT]}, "'messages' must hold a user's message"),
        ({"messages": [USER]}, "'messages' must hold a user's message"),
        ({"messages": [USER, USER]}, "exactly one assistant message after the prompt (got user)"),
        ({"messages": "Hi"}, "'messages' must be a list of messages, not a text"),
        ({"messages": [USER, "Hi"]}, "'messages[1]' must be an object with 'role' and 'content'"),
        ({"messages": [{"role": "robot", "content": "Hi"}, ASSISTANT]}, "unknown role 'robot'; known: system, user"),
        ({"messages": [{"role": [], "content": "Hi"}, ASSISTANT]}, "unknown role []"),
        ({"messages": [{"role": "user", "content": 3}, ASSISTANT]}, "'messages[0].content' must be a text"),
        ({"prompt": [ASSISTANT], "answer": "b"}, "'prompt' must hold a user's message"),
    ],
)
def test_a_bad_line_is_reported_with_file_number_and_reason(tmp_path, line, reason):
    path = write(tmp_path, [{"prompt": "a", "answer": "b"}, "", line])
    with pytest.raises(ValueError) as error:
        read_task(JsonlTaskConfig(path=path, held_out=1), 0)
    assert str(error.value).startswith(f"{path}:3: ")
    assert reason in str(error.value)


def test_bytes_that_are_no_text_are_reported_with_their_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n{"prompt": "caf\xe9", "answer": "b"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:2: not UTF-8"):
        read_task(JsonlTaskConfig(path=str(path), held_out=1), 0)


def test_all_bad_lines_are_in_one_error_and_no_more_than_ten_are_shown(tmp_path):
    rows = [{"prompt": "a", "answer": {} if number % 2 else "b"} for number in range(30)]
    with pytest.raises(ValueError) as error:
        read_task(JsonlTaskConfig(path=write(tmp_path, rows), held_out=1), 0)
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines[:-1]] == [str(2 * n) for n in range(1, 11)]
    assert lines[-1] == "and 5 more bad lines"


def test_a_column_that_no_line_has_is_one_line_of_error(tmp_path):
    path = write(tmp_path, [{"question": "a", "answer": "b"}] * 50)
    with pytest.raises(ValueError) as error:
        read_task(JsonlTaskConfig(path=path, held_out=1), 0)
    assert str(error.value) == (
        f"{path}:1: no column 'prompt'; columns there: question, answer; set task.prompt_column to the right one "
        "(and so in all 50 lines)"
    )


def test_an_answer_column_that_was_named_must_be_there(tmp_path):
    path = write(tmp_path, [{"prompt": "a", "answer": "b"}] * 2)
    with pytest.raises(
        ValueError, match=r"no column 'solution'; columns there: prompt, answer; set task\.answer_column"
    ):
        read_task(JsonlTaskConfig(path=path, held_out=1, answer_column="solution"), 0)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty: task\.path"):
        read_task(JsonlTaskConfig(path=str(path), held_out=1), 0)


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"task\.path: cannot read .*nothing\.jsonl.*No such file"):
        read_task(JsonlTaskConfig(path=str(tmp_path / "nothing.jsonl")), 0)
    with pytest.raises(ValueError, match=r"task\.path: cannot read .*Is a directory; task=hf reads folders"):
        read_task(JsonlTaskConfig(path=str(tmp_path)), 0)


def test_too_few_rows_to_hold_out_name_the_key(tmp_path):
    path = write(tmp_path, [{"prompt": f"q{number % 5}", "answer": "b"} for number in range(50)])
    with pytest.raises(ValueError, match=r"5 different prompts.*task\.held_out below 5"):
        read_task(JsonlTaskConfig(path=path, held_out=5), 0)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
roles = st.sampled_from(["user", "assistant", "system", "robot"])
messages = st.lists(
    st.fixed_dictionaries({"role": roles | scalars, "content": st.text(max_size=5) | scalars}) | scalars, max_size=4
)
columns = st.sampled_from(["prompt", "answer", "chosen", "rejected", "messages", "other"])
objects = st.dictionaries(columns, messages | scalars | st.dictionaries(st.text(max_size=3), scalars), max_size=5)
lines = objects.map(lambda row: json.dumps(row).encode()) | scalars.map(lambda row: json.dumps(row).encode())


@given(st.lists(lines | st.binary(max_size=20), max_size=6))
def test_any_file_gives_rows_or_one_error_that_names_the_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(content))
    try:
        raw = read_task(JsonlTaskConfig(path=str(path), held_out=1), 0)
    except ValueError as error:
        assert type(error) is ValueError
        assert str(path) in str(error)
        return
    task = make_task(raw, TOKENIZER)
    assert len(task.held_out) == 1
    assert all(prompt.ids for prompt in task.train)
    for prompt in task.train:
        assert task.score(prompt, "x") in (None, 0.0, 1.0)


def test_deep_nesting_and_huge_numbers_are_bad_lines(tmp_path):
    path = write(tmp_path, ["[" * 100_000, '{"prompt": ' + "9" * 5000 + "}", {"prompt": "a", "answer": "b"}])
    with pytest.raises(ValueError) as error:
        read_task(JsonlTaskConfig(path=path, held_out=1), 0)
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == ["1", "2"]


def test_reading_a_task_leaves_the_global_random_state_alone():
    random.seed(5)
    before = random.getstate()
    read_task(SortTaskConfig(prompts=50), 0)
    assert random.getstate() == before
