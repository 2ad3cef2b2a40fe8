"""task=hf: data sets as people have them, on this machine and by a hub's name, and one line for what is wrong."""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
import random
import re
import socket
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from chat_models import CHATML, tokenizer_with
from forked import FRESH, LIGHT

from rlhf.config import HfTaskConfig, JsonlTaskConfig
from rlhf.run import run
from rlhf.tasks import Row, make_task, read_task

pa = pytest.importorskip("pyarrow", reason="needs datasets: pip install -e '.[data]'")
datasets = pytest.importorskip("datasets", reason="needs datasets: pip install -e '.[data]'")
import pyarrow.parquet as parquet  # noqa: E402 - once it is there

SAID = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "ab"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
OTHER = {"type": "function", "function": {"name": "g", "arguments": {"y": "z"}}}
CALLS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, OTHER]},
    {"role": "tool", "name": "f", "content": "3"},
    {"role": "assistant", "content": "ab"},
]
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}},
    {"type": "function", "function": {"name": "g", "parameters": {"properties": {"y": {"type": "string"}}}}},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the hub and of datasets that has nothing, and is asked in place of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def read(path, **options):
    return read_task(HfTaskConfig(path=str(path), **{"held_out": 1} | options), 0)


def rows_of(raw) -> list[Row]:
    return [*raw.train, *raw.held_out]


def written(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def asked(raw) -> set[str]:
    return {row.question for row in rows_of(raw)}


def gsm8k(count: int) -> list[dict]:
    """Rows as the data set openai/gsm8k has them."""
    return [
        {
            "question": f"Natalia sold clips to {n} of her friends in April, and then half as many in May. How many?",
            "answer": f"Natalia sold {n}/2 = <<{n}/2={n / 2:g}>>{n / 2:g} clips in May.\n"
            f"She sold {n}+{n / 2:g} = <<{n}+{n / 2:g}={1.5 * n:g}>>{1.5 * n:g} clips altogether.\n#### {1.5 * n:g}",
        }
        for n in range(2, 2 * count + 2, 2)
    ]


# --- where rows lie ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["file", "folder"])
def test_gsm8ks_published_form_is_read_from_a_file_or_a_folder(tmp_path, where):
    file = written(tmp_path / "main" / "train-00000-of-00001.parquet", gsm8k(20))
    written(tmp_path / "main" / "test-00000-of-00001.parquet", gsm8k(30)[20:])
    raw = read(file if where == "file" else file.parent, columns={"prompt": "question"}, held_out=4)
    assert len(raw.train) == 16 and len(raw.held_out) == 4
    assert {(row.question, row.columns["answer"]) for row in rows_of(raw)} == {tuple(r.values()) for r in gsm8k(20)}
    assert all("<<" in row.columns["answer"] and "#### " in row.columns["answer"] for row in rows_of(raw))
    assert raw.train[0].where.startswith(f"{file} row ")


def test_the_files_of_a_split_are_read_in_their_order_and_named_by_file_and_row(tmp_path):
    for part in range(3):
        written(tmp_path / f"train-0000{part}-of-00003.parquet", [{"prompt": f"{part}-{n}"} for n in range(2)])
    raw = read(tmp_path)
    places = {row.question: row.where for row in rows_of(raw)}
    assert places == {
        f"{p}-{n}": f"{tmp_path}/train-0000{p}-of-00003.parquet row {n}" for p in range(3) for n in (0, 1)
    }


def stored(folder: Path, kind: str, rows: list[dict]) -> Path:
    """The rows as files of this kind have them."""
    path = folder / f"rows.{kind}"
    match kind:
        case "parquet":
            written(path, rows)
        case "arrow":
            table = pa.Table.from_pylist(rows)
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        case "stream":
            path = folder / "stream.arrow"
            table = pa.Table.from_pylist(rows)
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "csv" | "tsv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], dialect="excel-tab" if kind == "tsv" else "excel")
                writer.writeheader()
                for row in rows:
                    lists = {key: json.dumps(value) for key, value in row.items() if isinstance(value, (list, dict))}
                    writer.writerow({**row, **lists})
        case "disk":
            datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream", "jsonl", "csv", "tsv", "disk"])
@pytest.mark.parametrize(
    "form",
    [
        {"prompt": "q{}", "answer": 'a, "b"\nc'},
        {"prompt": "q{}", "answer": 7},
        {"prompt": "q{}", "chosen": "good", "rejected": "bad"},
        {"messages": [{"role": "user", "content": "q{}"}, *CALLS], "tools": TOOLS},
        {"prompt": [{"role": "user", "content": "q{}"}], "completion": [SAID[1]]},
        {"conversations": [{"from": "human", "value": "q{}"}, {"from": "gpt", "value": "ab"}]},
        {"prompt": [{"role": "user", "content": "q{}"}], "reward_model": {"style": "rule", "ground_truth": "7"}},
        {
            "prompt": [{"role": "user", "content": "q{}"}],
            "answer": "7",
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ],
    ids=["texts", "numbers", "pairs", "tools", "completion", "sharegpt", "verl", "template"],
)
def test_a_row_of_each_form_is_the_same_from_every_kind_of_file(tmp_path, kind, form):
    rows = [json.loads(json.dumps(form).replace("q{}", f"q{n}")) for n in range(4)]
    reference = tmp_path / "reference.jsonl"
    reference.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = read_task(JsonlTaskConfig(path=str(reference), held_out=1), 0)
    raw = read(stored(tmp_path, kind, rows))

    def content(row: Row):
        return row.question, row.demonstration, row.preference, row.given, list(row.turns), dict(row.columns)

    assert list(map(content, rows_of(raw))) == list(map(content, rows_of(expected)))


def test_a_null_key_of_a_table_is_an_absent_one_also_inside_calls_and_tools(tmp_path):
    rows = [{"messages": CALLS, "tools": TOOLS, "note": {"a": n or None, "b": [None]}} for n in range(2)]
    rows[1] = {**rows[1], "messages": [{"role": "user", "content": "other"}, *CALLS]}
    [row] = [row for row in rows_of(read(written(tmp_path / "rows.parquet", rows))) if len(row.longest) == 3]
    assert row.turns == [(CALLS[:1], CALLS[1])], "no call has another one's arguments"
    assert row.given == {"tools": TOOLS} and row.columns["note"] == {"b": [None]}


def test_a_column_that_is_null_in_every_row_is_absent(tmp_path):
    rows = [{"prompt": f"q{n}", "answer": "a", "chosen": None, "rejected": None, "messages": None} for n in range(3)]
    assert all(row.columns == {"answer": "a"} for row in rows_of(read(written(tmp_path / "rows.parquet", rows))))


def test_columns_of_the_type_json_are_what_they_hold(tmp_path):
    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no such type")
    mixed = [{"role": "user", "content": [{"type": "text", "text": "q"}]}, SAID[1]]
    rows = [{"messages": mixed, "tools": [{"name": "f", "parameters": {}}]}, {"messages": SAID, "tools": []}]
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(str(tmp_path / "rows.parquet"))
    raw = read(tmp_path / "rows.parquet")
    assert {row.question[0]["content"]: row.given for row in rows_of(raw)} == {
        "q": {"tools": [{"name": "f", "parameters": {}}]},
        "hello": {},
    }


def test_what_json_cannot_have_is_kept_as_far_as_it_can_be_and_else_left_out_and_named(tmp_path):
    image = {"bytes": b"\x89PNG", "path": "a.png"}
    rows = [
        {
            "prompt": f"q{n}",
            "day": datetime.date(2024, 1, 5),
            "moment": datetime.datetime(2024, 1, 5, 12, 30),
            "price": Decimal("1.50"),
            "count": Decimal("7"),
            "score": math.nan if n else 0.5,
            "raw": b"\x00",
            "image": image,
            "extra": {"index": n, "raw": b"\x00"},
            "vector": [1.0, 2.0],
            "__index_level_0__": n,
        }
        for n in range(2)
    ]
    path = written(tmp_path / "rows.parquet", rows)
    raw = read(path)
    found = {row.question: row.columns for row in rows_of(raw)}
    kept = {"day": "2024-01-05", "moment": "2024-01-05T12:30:00", "price": 1.5, "count": 7, "vector": [1.0, 2.0]}
    assert found == {"q0": {**kept, "score": 0.5, "extra": {"index": 0}}, "q1": {**kept, "extra": {"index": 1}}}
    assert json.dumps(found, allow_nan=False), "as a reward server is sent them"
    [note] = raw.notes
    assert note == (
        f"{path}: columns that are no JSON are left out: 'extra.raw' (binary), 'image' (struct<bytes: binary, "
        "path: string>), 'raw' (binary)"
    )


def test_a_prompt_that_is_no_json_is_one_line(tmp_path):
    path = written(tmp_path / "rows.parquet", [{"question": b"q", "answer": "a"}] * 2)
    with pytest.raises(ValueError) as error:
        read(path, columns={"prompt": "question"})
    assert str(error.value).startswith(f"{path}: the column 'question' is of type binary, and must be of texts")


def test_whole_answers_that_a_table_has_as_floats_are_whole_numbers(tmp_path):
    path = written(tmp_path / "whole.parquet", [{"prompt": f"q{n}", "answer": n or None} for n in range(3)])
    table = parquet.read_table(path)
    parquet.write_table(table.set_column(1, "answer", table["answer"].cast(pa.float64())), path)
    raw = read(path)
    assert {row.question: row.demonstration for row in rows_of(raw)} == {"q0": None, "q1": "1", "q2": "2"}
    assert raw.notes == [f"{path}: 'answer' has floats that are all whole: taken as 7, not as 7.0"]
    other = read(written(tmp_path / "some.parquet", [{"prompt": f"q{n}", "answer": n / 2} for n in range(3)]))
    assert {row.demonstration for row in rows_of(other)} == {"0.0", "0.5", "1.0"} and not other.notes


def test_csv_has_texts_as_they_stand_and_an_empty_field_is_absent(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufeffprompt,answer,note\r\nq0,007,NA\r\nq1,1.50,\r\nq2,None,null\r\nq3,,x\r\n".encode())
    found = {row.question: row.columns for row in rows_of(read(path))}
    assert found == {
        "q0": {"answer": "007", "note": "NA"},
        "q1": {"answer": "1.50"},
        "q2": {"answer": "None", "note": "null"},
        "q3": {"note": "x"},
    }


def test_messages_in_a_csv_may_be_as_python_prints_them_and_a_text_stays_one(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["messages", "tools"], [SAID, TOOLS], [[{"role": "user", "content": "it's"}, SAID[1]], None]]
        )
    raw = read(path)
    assert {row.question[0]["content"] for row in rows_of(raw)} == {"hello", "it's"}
    path.write_text('prompt,answer\n"[1, 2]: which is more?",2\n"[3, 4]",4\n')
    assert asked(read(path)) == {"[1, 2]: which is more?", "[3, 4]"}


def test_a_field_of_a_csv_may_be_long(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,answer\n{'a' * 500_000},b\nc,d\n")
    assert max(map(len, asked(read(path)))) == 500_000


def test_messages_whose_keys_are_lists_are_messages(tmp_path):
    said = {key: [message[key] for message in SAID] for key in ("role", "content")}
    rows = [
        {"messages": said, "note": {"role": ["a"], "content": ["b"]}},
        {"messages": {**said, "content": ["c", "d"]}},
    ]
    raw = read(written(tmp_path / "rows.parquet", rows))
    assert {row.question[0]["content"]: row.demonstration for row in rows_of(raw)} == {"hello": "ab", "c": "d"}
    assert raw.train[0].columns in ({}, {"note": {"role": ["a"], "content": ["b"]}}), "which is no message"


def test_files_may_be_named_by_a_pattern(tmp_path):
    for part in range(3):
        written(tmp_path / f"{'ab'[part % 2]}{part}.parquet", [{"prompt": f"{part}-{n}"} for n in range(2)])
    assert asked(read(tmp_path / "a*.parquet")) == {"0-0", "0-1", "2-0", "2-1"}
    with pytest.raises(ValueError, match=r"task\.path: cannot read .*c\*\.parquet from .*No such file"):
        read(tmp_path / "c*.parquet")


def test_values_of_a_category_are_those_that_it_names(tmp_path):
    table = pa.table({"prompt": ["a", "b"], "answer": pa.array(["x", "y"]).dictionary_encode()})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert {row.demonstration for row in rows_of(read(tmp_path / "rows.parquet"))} == {"x", "y"}


# --- splits -----------------------------------------------------------------------------------------------------------


def splits(folder: Path, kind: str) -> Path:
    """The splits train, of q0 to q9, and test, of t0 to t2."""
    train, test = [{"prompt": f"q{n}"} for n in range(10)], [{"prompt": f"t{n}"} for n in range(3)]
    if kind == "folder":
        written(folder / "data" / "train-00000-of-00002.parquet", train[:4])
        written(folder / "data" / "train-00001-of-00002.parquet", train[4:])
        written(folder / "data" / "test-00000-of-00001.parquet", test)
        return folder
    both = {"train": datasets.Dataset.from_list(train), "test": datasets.Dataset.from_list(test)}
    datasets.DatasetDict(both).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("kind", ["folder", "save_to_disk"])
@pytest.mark.parametrize(
    ("split", "prompts"),
    [
        (None, {f"q{n}" for n in range(10)}),
        ("test", {"t0", "t1", "t2"}),
        ("train[2:6]", {"q2", "q3", "q4", "q5"}),
        ("train[-2:]", {"q8", "q9"}),
        ("train[:20%]", {"q0", "q1"}),
        ("train[:1]+test[1:]", {"q0", "t1", "t2"}),
    ],
)
def test_a_split_or_a_part_of_one_is_read(tmp_path, kind, split, prompts):
    assert asked(read(splits(tmp_path, kind), split=split)) == prompts


def test_a_part_of_a_data_set_that_was_saved_is_read_whatever_its_split_is_called(tmp_path):
    both = datasets.Dataset.from_list([{"prompt": f"q{n}"} for n in range(4)], split="train[:4]+test")
    both.save_to_disk(str(tmp_path / "saved"))
    assert asked(read(tmp_path / "saved")) == {"q0", "q1", "q2", "q3"}


@pytest.mark.parametrize("kind", ["folder", "save_to_disk"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "tset"}, "task.split: {path} has no split 'tset'; its splits: train, test"),
        ({"held_out_split": "dev"}, "task.held_out_split: {path} has no split 'dev'; its splits: train, test"),
        ({"split": "train[a:b]"}, "task.split=train[a:b]: Unrecognized instruction format: train[a:b]: write it like"),
    ],
)
def test_a_split_that_is_not_there_is_one_line_that_names_those_that_are(tmp_path, kind, options, said):
    path = splits(tmp_path, kind)
    with pytest.raises(ValueError) as error:
        read(path, **options)
    assert str(error.value).startswith(said.format(path=path))


def test_where_no_split_is_called_train_one_must_be_named(tmp_path):
    for name in ("test", "validation"):
        written(tmp_path / f"{name}.parquet", [{"prompt": f"{name}{n}"} for n in range(2)])
    with pytest.raises(ValueError, match=r"task\.split must say which split of .* to take: \w+, \w+"):
        read(tmp_path)
    assert asked(read(tmp_path, split="test")) == {"test0", "test1"}


@pytest.mark.parametrize("kind", ["folder", "save_to_disk"])
def test_held_out_rows_come_from_a_split_of_their_own(tmp_path, kind):
    raw = read(splits(tmp_path, kind), held_out_split="test", held_out=64)
    assert {row.question for row in raw.held_out} == {"t0", "t1", "t2"} and len(raw.train) == 10
    few = read(splits(tmp_path / "again", kind), held_out_split="test", held_out=2)
    assert len(few.held_out) == 2 and few.notes[0].startswith("held out: 2 (task.held_out) of the 3 prompts of ")
    part = read(splits(tmp_path / "part", kind), split="train[:6]", held_out_split="train[6:]", held_out=9)
    assert {row.question for row in part.held_out} == {"q6", "q7", "q8", "q9"} and len(part.train) == 6


def test_held_out_rows_come_from_another_data_set(tmp_path):
    own = stored(tmp_path, "csv", [{"prompt": "t0", "answer": "x"}])
    raw = read(splits(tmp_path, "folder"), held_out_path=str(own))
    assert [row.question for row in raw.held_out] == ["t0"] and len(raw.train) == 10


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.parquet", b"PAR1\x15\x04\x15", "task.path: cannot read {path}: "),
        ("cut.arrow", b"ARROW1\0\0abc", "task.path: cannot read {path}: "),
        ("rows.csv", b"prompt,answer\na,b,c\nd,e\n", "{path}:2: has 3 fields, and the header 2"),
        ("rows.csv", b"prompt,prompt\na,b\n", "{path}: the column 'prompt' is there twice"),
        ("rows.csv", b"prompt,answer\ncaf\xe9,b\n", "{path}:1: not UTF-8"),
        ("rows.csv", b'prompt,answer\n"a,b\n', "{path}:2: not csv: "),
        ("rows.csv", "\ufeffprompt\na\n".encode("utf-16-le"), "{path}: that is UTF-16: write it anew as UTF-8"),
        ("rows.csv", b"prompt\n", "{path} is empty: task.split must name a data set that has rows"),
        (
            "rows.parquet",
            b"version https://git-lfs.github.com/spec/v1\n",
            "{path}: that is a pointer of git-lfs: fetch",
        ),
        ("rows.zip", b"PK\x03\x04\x14", "{path}: that is a zip archive: unpack it"),
        ("rows.txt", b"hello", "{path}: that is no file that task=hf reads: task.path takes parquet, arrow, csv, tsv"),
        ("rows.parquet", None, "task.path: cannot read {path} from "),
        ("none", None, "task.path: cannot read {path} from "),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(said.format(path=path)), error.value
    assert "\n" not in str(error.value)


def test_a_folder_without_data_and_one_of_other_files_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"task\.path: no data set is in the folder .*empty"):
        read(tmp_path / "empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match="has files that datasets reads as 'text': task=hf takes parquet"):
        read(tmp_path / "texts")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream", "csv", "jsonl"])
def test_a_file_with_other_bytes_gives_rows_or_one_error_that_names_it(tmp_path, kind):
    path = stored(tmp_path, kind, [{"prompt": f"q{n}", "answer": str(n), "note": {"a": n}} for n in range(40)])
    whole, rng, read_again = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        other = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(other))
            other[at : at + rng.randrange(8)] = rng.randbytes(rng.randrange(8))
        path.write_bytes(other)
        try:
            read_again += len(read(path).train) > 0
        except ValueError as error:
            assert type(error) is ValueError and str(path) in str(error)
    assert read_again < 60, "nothing was wrong with any"


def test_an_address_is_none_of_what_is_read():
    with pytest.raises(ValueError, match=r"^task\.path: https://x/rows\.parquet is an address: task=hf takes files"):
        read("https://x/rows.parquet")


def test_a_folder_is_read_where_nothing_can_be_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/dev/null/none")
    assert len(asked(read(splits(tmp_path, "folder")))) == 10


@pytest.mark.parametrize("path", ["rows.parquet", "none.parquet"])
def test_mistakes_in_a_file_are_answered_before_anything_heavy_is_imported(rlhf_train, tmp_path, path):
    written(tmp_path / "rows.parquet", [{"question": "a"}] * 3)
    done = rlhf_train("mode=check", "task=hf", f"task.path={path}", "task.split=tset", env={LIGHT: "1"})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"^task\.(path|split): ", done.stderr, re.MULTILINE), done.stderr


@pytest.fixture
def without_torch(tmp_path):
    """Variables of a process that imports all itself, and says at its end if torch or transformers is there."""
    (tmp_path / "site").mkdir()
    code = "import atexit, sys\natexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
    (tmp_path / "site" / "sitecustomize.py").write_text(code)
    return {FRESH: "1", "PYTHONPATH": f"{Path(__file__).parent.parent}{os.pathsep}{tmp_path / 'site'}"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "save_to_disk"])
def test_mistakes_in_a_folder_are_answered_without_torch(rlhf_train, tmp_path, without_torch, kind):
    path = splits(tmp_path, kind)
    done = rlhf_train("mode=check", "task=hf", f"task.path={path}", "task.split=tset", env=without_torch)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"task.split: {path} has no split 'tset'; its splits: train, test" in done.stderr
    assert done.stderr.endswith("False\n"), done.stderr


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up_in_one_line(rlhf_train, without_torch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        done = rlhf_train("task=hf", "task.path=openai/gsm8k", env=hub | without_torch, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.endswith("False\n"), done.stderr
    assert "as a data set of the Hugging Face hub it cannot be read: the hub does not answer" in done.stderr


def test_a_damaged_folder_of_save_to_disk_is_one_line(tmp_path):
    path = stored(tmp_path, "disk", [{"prompt": "a"}, {"prompt": "b"}])
    next(path.glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match=r"task\.path: cannot read .* as of save_to_disk: "):
        read(path)


def test_one_of_several_data_sets_of_a_folder_is_chosen_by_its_name(tmp_path):
    for name in ("main", "socratic"):
        written(tmp_path / name / "train.parquet", [{"prompt": f"{name}{n}"} for n in range(2)])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("main", "socratic"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert asked(read(tmp_path, name="socratic")) == {"socratic0", "socratic1"}
    with pytest.raises(ValueError, match=r"no data set is in the folder .*'main', 'socratic'.*; set task\.name"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"task\.name is of folders and hub names"):
        read(tmp_path / "main" / "train.parquet", name="main")


def test_a_column_that_is_named_and_not_there_is_one_line(tmp_path):
    path = written(tmp_path / "rows.parquet", [{"question": f"q{n}"} for n in range(5)])
    with pytest.raises(ValueError) as error:
        read(path, columns={"prompt": "problem"})
    assert str(error.value) == (
        f"{path} row 0: no column 'problem'; columns there: question; set task.columns to the right one "
        "(and so in all 5 lines)"
    )


@pytest.mark.parametrize("how", [None, ImportError])
def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch, how):
    class Finder:
        @staticmethod
        def find_spec(name, *_):
            if name == "datasets":
                raise ImportError(name)

    for name in [name for name in sys.modules if name == "datasets" or name.startswith("datasets.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", None) if how is None else monkeypatch.setattr(
        sys, "meta_path", [Finder, *sys.meta_path]
    )
    with pytest.raises(ValueError, match=r"^task=hf needs the package datasets: pip install 'rlhf-transfer\[data\]'"):
        read(tmp_path / "rows.parquet")


def test_a_hubs_name_that_nobody_answers_for_is_one_line():
    with pytest.raises(ValueError) as error:
        read("openai/gsm8k", name="main")
    said = str(error.value)
    assert said.startswith("task.path: openai/gsm8k is no file or folder in ") and "\n" not in said
    assert "HF_HUB_OFFLINE is set, and the cache (" in said


def test_a_hubs_name_is_read_from_the_cache_where_the_hub_is_not_asked(tmp_path, cache):
    from datasets.packaged_modules.parquet.parquet import Parquet

    files = {"train": [str(written(tmp_path / "train.parquet", gsm8k(6)))]}
    files["test"] = [str(written(tmp_path / "test.parquet", gsm8k(8)[6:]))]
    builder = Parquet(
        cache_dir=str(tmp_path / "made"), dataset_name="gsm8k", config_name="main", data_files=files, hash="0a"
    )
    builder.download_and_prepare()
    (cache / "openai___gsm8k" / "main" / "0.0.0").mkdir(parents=True)
    Path(builder.cache_dir).rename(cache / "openai___gsm8k" / "main" / "0.0.0" / "0a")
    raw = read("openai/gsm8k", name="main", columns={"prompt": "question"}, held_out_split="test", held_out=9)
    assert len(raw.train) == 6 and len(raw.held_out) == 2
    assert raw.train[0].where.startswith("openai/gsm8k train row ")


# --- the task that is made --------------------------------------------------------------------------------------------


def test_rows_of_a_data_set_are_told_apart_by_resume_as_those_of_a_file(tmp_path):
    from rlhf.checkpoint.rows import check_rows, splits_of
    from rlhf.shell.ending import RunError

    tokenizer = tokenizer_with(CHATML)
    path = tmp_path / "rows.parquet"
    rows = [{"prompt": f"q{n}", "answer": "ab", "day": datetime.date(2024, 1, 5)} for n in range(6)]

    def task(rows):
        return make_task(read(written(path, rows)), tokenizer)

    before = splits_of(task(rows), tokenizer)
    again = task(rows)
    assert not check_rows(before, splits_of(again, tokenizer), again, allowed=False)
    other = task([{**row, "day": datetime.date(2024, 1, 6 if n == 3 else 5)} for n, row in enumerate(rows)])
    with pytest.raises(RunError, match="rows are not those that the run began with"):
        check_rows(before, splits_of(other, tokenizer), other, allowed=False)


@pytest.mark.slow
def test_a_run_asks_gsm8ks_questions_behind_a_system_message_and_evaluates_on_the_other_split(compose_run, tmp_path):
    written(tmp_path / "main" / "train-00000-of-00001.parquet", gsm8k(20))
    written(tmp_path / "main" / "test-00000-of-00001.parquet", gsm8k(24)[20:])
    small = "experiment=smoke transfer=local logger=jsonl model.layers=1 model.context=512 steps=1 sft.steps=1"
    rows = "prompts_per_step=2 samples_per_prompt=2 updates_per_step=1 rollout.max_new_tokens=2 reward=verifier"
    data = ["task=hf", f"task.path={tmp_path / 'main'}", "task.columns={prompt: question}", "task.held_out_split=test"]
    config = compose_run(*small.split(), *rows.split(), *data, "task.system=Be brief.", "task.longest_prompt=200")
    run(config, tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples and all("Be brief." in sample["prompt"] and "Natalia" in sample["prompt"] for sample in samples)
