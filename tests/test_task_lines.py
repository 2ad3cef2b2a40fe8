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
    ("name", "content", "said"),
    [
        ("rows.parquet", b"PAR1\x15\x04\x15", "that is parquet: use task=hf"),
        ("rows.arrow", b"ARROW1\0\0", "that is arrow: use task=hf"),
        ("rows.csv", b"prompt,answer\na,b\n", "that is csv: use task=hf"),
        ("rows.csv.gz", gzip.compress(b"prompt,answer\na,b\n", mtime=0), "that is csv: use task=hf"),
        ("rows.tsv", b"prompt\tanswer\na\tb\n", "that is tsv: use task=hf"),
        ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd\0\0", "that is compressed by zstd: unpack it (zstd -d FILE)"),
        ("rows.jsonl.bz2", b"BZh91AY", "that is compressed by bzip2: unpack it"),
        ("rows.jsonl.xz", b"\xfd7zXZ\0", "that is compressed by xz: unpack it"),
        ("rows.zip", b"PK\x03\x04\x14", "that is a zip archive: unpack it"),
        (
            "rows.jsonl",
            "\ufeff".encode("utf-16-le") + GOOD.encode("utf-16-le"),
            "that is UTF-16: write it anew as UTF-8",
        ),
        ("rows.jsonl", GOOD.encode("utf-16-be"), "that is UTF-16 or no text at all: write it anew as UTF-8"),
        ("rows.json", b'{\n  "prompt": "a",\n  "answer": "b"\n}\n', "that is a JSON object over several lines"),
    ],
)
def test_a_file_of_another_kind_is_one_line_that_says_which_and_what_to_do(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: {said}") and "\n" not in str(error.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("pack", [bytes, lambda raw: gzip.compress(raw, mtime=0)], ids=["bytes", "gzip"])
@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_json_lines_and_an_array_are_the_same_rows_plain_and_packed(tmp_path, indent, pack, mark):
    rows = [{"prompt": f"q{n}", "answer": "[{,}]", "note": [{"a": n}]} for n in range(9)]
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    array.write_bytes(pack(mark + f"\n {json.dumps(rows, indent=indent)}\n\n".encode()))
    other = read(array)
    one = read(lines)
    assert [row.question for row in one.train] == [row.question for row in other.train]
    assert [row.columns for row in one.train] == [row.columns for row in other.train]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (f'[\n{GOOD},\n{{"prompt": "c", "score": NaN}}]', 3, "not JSON: NaN is no JSON number"),
        (f'[\n{GOOD},\n{{"prompt": "c", "prompt": "d"}}]', 3, "not JSON: the key 'prompt' is there twice"),
        (f'[\n{GOOD},\n{{"prompt": "c",}}]', 3, "not JSON: "),
        (f"[\n{GOOD}\n{GOOD}]", 2, "not JSON: behind it must be ',' or ']'"),
        (f"[\n{GOOD},\n\n{GOOD}", 4, "not JSON: behind it must be ',' or ']'"),
        (f"[\n{GOOD},\n]", 3, "not JSON: "),
        (f"[{GOOD},\n 7,\n{GOOD}]", 2, "must be a JSON object, not a number"),
        (f'[{GOOD},\n {{"question": 1}},\n{GOOD}]', 2, "no column 'prompt'"),
        (f"[{GOOD}]\n[{GOOD}]", 1, "must be a JSON object, not an array"),
        (f"[\n{GOOD}]\nx", 2, "not JSON: more is behind the array"),
        (f"[\n{GOOD},\n" + "[" * 100_000, 3, "nested too deeply"),
    ],
)
def test_what_is_bad_in_an_array_is_reported_by_its_line(tmp_path, content, line, reason):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and reason in str(error.value).partition("\n")[0]


@pytest.mark.parametrize("content", ["[]", " [ \n ] \n"])
def test_an_empty_array_is_an_empty_file(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"rows\.json is empty: task\.path"):
        read(path)


def test_bytes_that_are_no_text_in_an_array_are_reported_with_their_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(f"[\n{GOOD},\n".encode() + b'{"prompt": "caf\xe9"}]')
    with pytest.raises(ValueError, match=r"rows\.json:3: not UTF-8"):
        read(path)


@pytest.mark.parametrize("cut", [5, 40])
def test_a_damaged_gzip_is_one_line(tmp_path, cut):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((GOOD + "\n").encode() * 50)[:cut])
    with pytest.raises(ValueError, match=r"task\.path: cannot read .*rows\.jsonl\.gz from .*: its gzip is damaged"):
        read(path)


def test_a_mistake_that_is_in_every_row_is_said_without_reading_all_of_a_large_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a"}\n' * 5000 + GOOD)
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value) == (
        f"{path}:1: no column 'prompt'; columns there: question; set task.prompt_column to the right one "
        "(and so in the first 1000 lines)"
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
