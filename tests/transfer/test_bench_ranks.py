"""`python -m transfer.bench --ranks N`: pushes of a trainer with shards, beside gathering them."""

import json
import os

import pytest
import torch
from bench_command import main_here
from shared_memory import left_in_shared_memory

from transfer.agreement.manifest import Manifest
from transfer.bench import ranks_table
from transfer.bench.ranks import Case, Measured, Setting, Timed
from transfer.bench.shapes import Model
from transfer.bench.tensor_parallel import Part, part_of
from transfer.config import Verify


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "1"], "--ranks must be from 2 to 16 (got 1)"),
        (["--ranks", "2", "--receivers", "tp1"], "--receivers must be from 1 to 8, or from tp2 to tp8 (got 'tp1')"),
        (["--receivers", "2"], "--receivers needs --ranks"),
        (["--ranks", "2", "--shapes", "int.json"], "tensors must have floating-point rows (int: w is int8 (3, 2))"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(arguments, said, tmp_path, capsys, monkeypatch):
    (tmp_path / "int.json").write_text('{"w": {"dtype": "I8", "shape": [3, 2]}}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main_here(*arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--ranks", "2", "--receivers", "2"], ["--ranks", "3", "--receivers", "tp2"]])
def test_whoever_receives_holds_what_gathering_gives_and_nothing_is_left(arguments, tmp_path, capsys):
    shapes = {"layers.0.o_proj.weight": [12, 8], "layers.0.q_proj.weight": [7, 8], "norm.weight": [8]}
    (tmp_path / "small.json").write_text(json.dumps(shapes))
    report = tmp_path / "report.json"
    before = set(os.listdir("/dev/shm"))
    main_here(*arguments, "--shapes", str(tmp_path / "small.json"), "--repeats", "2", "--json", str(report))
    assert left_in_shared_memory(before, 5.0) == set()
    (told,) = json.loads(report.read_text())["models"]
    assert [row["verified"] for row in told["rows"]] == [True, True], told
    assert all(row["push_ms"] >= row["write_ms"] > 0 < row["read_ms"] for row in told["rows"])
    assert {bar["what"] for bar in told["bars"]} == {"read to memcpy", "gather to read"}
    table = capsys.readouterr().out
    assert table.count("right") == 2 and "full_tensor() of each and broadcast" in table and "WRONG" not in table


def test_tensor_parallel_ranks_hold_rows_or_columns_and_norms_whole():
    weights = {"a.o_proj.weight": torch.arange(24).view(4, 6), "a.q_proj.weight": torch.arange(24).view(4, 6)}
    weights |= {
        "norm.weight": torch.arange(4),
        "a.q_proj.bias": torch.arange(4),
        "odd.weight": torch.arange(9).view(3, 3),
    }
    parts = {name: [part_of(name, tensor, rank, 2) for rank in range(2)] for name, tensor in weights.items()}
    assert torch.equal(torch.cat(parts["a.o_proj.weight"], 1), weights["a.o_proj.weight"])
    for name in ("a.q_proj.weight", "a.q_proj.bias"):
        assert torch.equal(torch.cat(parts[name]), weights[name]) and len(parts[name][0]) == 2
    for name in ("norm.weight", "odd.weight"):
        assert all(torch.equal(part, weights[name]) for part in parts[name])


def measured(device, read, memcpy=0.1, right=True):
    setting = Setting(
        model=Model("m", {"w": ("bfloat16", (4, 4))}),
        ranks=2,
        workers=1,
        parts=1,
        device=device,
        repeats=1,
        folder=None,
        progress=None,
    )
    timed = Timed(case=Case(verify=Verify.off), push=[0.2], write=[0.05], read=[read], memcpy=[memcpy], right=right)
    limits = {"copy of the other ranks' rows to the first GPU": 0.1} if device == "cuda" else {}
    return ranks_table.as_json(Measured(setting=setting, rows=[timed], gather=[1.0], limits=limits))


@pytest.mark.parametrize(
    ("device", "read", "met"),
    [("cpu", 0.11, [True, True]), ("cpu", 0.3, [False, False]), ("cuda", 0.12, [False, False])],
)
def test_a_bar_is_met_or_missed_by_the_figure_that_was_measured(device, read, met):
    told = measured(device, read)
    assert [bar["met"] for bar in told["bars"]] == met
    table = ranks_table.text(told)
    assert table.count("missed") == met.count(False)
    assert "WRONG" in ranks_table.text(measured(device, read, right=False))


def test_a_part_loads_its_own_part_of_every_tensor_and_passes_over_tied_names():
    weights = {"a.o_proj.weight": torch.randn(4, 6), "norm.weight": torch.randn(4)}
    part = Part(Manifest.of(weights), 1, 2, torch.device("cpu"))
    part.load([*weights.items(), ("tied.weight", torch.zeros(1))])
    assert torch.equal(part.parts[0], weights["a.o_proj.weight"][:, 3:]) and torch.equal(
        part.parts[1], weights["norm.weight"]
    )
