"""Files that are no clean JSON lines: what is read, and what is said in one line."""

from __future__ import annotations

import gzip
import json

import pytest

from rlhf.config import JsonlTaskConfig
from rlhf.tasks import read_task

GOOD = '{"prompt": "a", "answer": "b"}'


def read(path, **options):
    return read_task(JsonlTaskConfig(path=str(path), held_out=1, **options), 0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "c", "score": NaN}', "not JSON: NaN is no JSON number (RFC 8259): write null"),
        ('{"prompt": "c", "score": [-Infinity]}', "not JSON: -Infinity is no JSON number"),
        ('{"prompt": "c", "answer": NaN}', "not JSON: NaN is no JSON number"),
        ('{"prompt": "c", "answer": "d", "answer": "e"}', "not JSON: the key 'answer' is there twice"),
        ('{"prompt": [{"role": "user", "role": "assistant", "content": "c"}]}', "the key 'role' is there twice"),
        ('{"prompt": "c", "answer": "d"', "not JSON"),
        ('{"prompt": "c\\udfff"}', "not UTF-8"),
    ],
)
def test_a_line_that_readers_take_in_several_ways_is_refused_by_its_number(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: ") and reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("rows.parquet", b"PAR1\x15\x04\x15", "a Parquet file"),
        ("rows.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0), "compressed by gzip"),
        ("rows.arrow", b"ARROW1\0\0", "an Arrow file"),
        ("rows.jsonl", "\ufeff".encode("utf-16-le") + GOOD.encode("utf-16-le"), "UTF-16"),
        ("rows.csv", b"prompt,answer\na,b\n", "a CSV file"),
        ("rows.tsv", b"prompt\tanswer\na\tb\n", "a TSV file"),
        ("rows.json", f"[{GOOD}, {GOOD}]".encode(), "one JSON array"),
        ("rows.json", f" [\n {GOOD},\n {GOOD}\n]\n".encode(), "one JSON array"),
    ],
)
def test_a_file_of_another_kind_is_one_line_that_says_which_and_what_to_do(tmp_path, name, content, kind):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value) == (
        f"{path} is {kind}, and task.path takes JSON lines, one object a line, in UTF-8: write it anew, "
        "for instance with datasets.load_dataset(...)[...].to_json(path)"
    )


def test_a_file_of_one_prompt_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD)
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value) == (
        f"{path} has one prompt, and one at least is held out: add lines with other prompts to task.path"
    )


def test_pairs_of_equal_answers_are_left_out_with_their_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"q{n}", "chosen": "b", "rejected": "c" if n % 3 else "b"} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = read(path)
    assert {row.question for row in [*raw.train, *raw.held_out]} == {f"q{n}" for n in range(12) if n % 3}
    assert raw.notes == [
        "warning: pairs whose chosen and rejected answers are the same are left out: "
        f"4 ({path}:1, {path}:4, {path}:7, and 1 more)"
    ]


def test_a_file_whose_pairs_are_all_of_equal_answers_is_refused_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "chosen": "b", "rejected": "b"}) + "\n" for n in range(3)))
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value) == f"{path}:1: 'chosen' and 'rejected' are the same (and so in all 3 lines)"


def test_a_named_answer_column_may_be_null_in_some_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "right": null}\n{"prompt": "b", "right": 4}\n')
    raw = read(path, answer_column="right")
    found = {row.question: (row.columns, row.demonstration) for row in [*raw.train, *raw.held_out]}
    assert found == {"a": ({}, None), "b": ({"right": "4"}, "4")}
