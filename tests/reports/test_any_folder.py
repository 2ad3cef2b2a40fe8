"""Whatever a run's folder holds, there is a report, or one line; never a traceback, and nothing that waits for ever."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
from pathlib import Path

import pytest

from rlhf.report import main as report
from rlhf.reports.plots import plot_curves
from rlhf.reports.run_folder import read_run
from rlhf.reports.summary import mean_of, summarise
from rlhf.sweep import main as sweep

STRANGE = [1e308, -1e308, math.nan, math.inf, -math.inf, "x", None, [], {}, True, 10**400, 0, -1, 5e-324]
METRICS = ("step", "eval/reward", "eval/gold", "train/reward", "seconds/step", "seconds/sample", "seconds/transfer")
METRICS += ("tokens_per_second", "train/kl", "alarm/kl", "gpu_idle/learn", "train/mfu", "eval/pass_at_4")
SAMPLE = ("step", "reward", "gold", "prompt", "answer", "conversation", "finish_reason")
LANES = ("step", "until", "since", "lanes")
SUMMARY = ("reward_end", "gold_end", "step_ms", "seconds", "gpu_memory_mib/trainer", "overrides", "error")
CONFIGS = ("steps: 6\nobjective: gold\nalgo: {name: x}\n", "[1]", "a: [", "objective: none\n", "${x}\n", "5", "")


def strange(draw: random.Random, names: tuple[str, ...], kept: float = 0.85) -> dict[str, object]:
    return {name: draw.choice([draw.random(), draw.choice(STRANGE)]) for name in names if draw.random() < kept}


def fill(folder: Path, draw: random.Random) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(draw.choice(CONFIGS))
    (folder / ".hydra" / "overrides.yaml").write_text(draw.choice(["- a=1\n- 5\n", "x", "{a: 1}", "- [1]\n", "- ["]))
    rows = [{"step": step, **strange(draw, METRICS[draw.random() < 0.8 :])} for step in range(draw.randint(0, 6))]
    lines = [json.dumps(row) for row in rows] + [draw.choice(["[]", "[" * 10**5, "{", ""])]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    samples = [json.dumps(strange(draw, SAMPLE)) for _ in range(5)]
    (folder / "samples.jsonl").write_text("\n".join(samples))
    lanes = [
        {"step": step, "until": step + 1.0, "lanes": {"trainer": [["learn", step, step + 0.5]]}} for step in range(4)
    ]
    lanes += [
        strange(draw, LANES),
        {"before": strange(draw, LANES)},
        {"step": 4, "until": 5, "lanes": {"a": [STRANGE]}},
    ]
    (folder / "lanes.jsonl").write_text("\n".join(json.dumps(row) for row in lanes[draw.randint(0, 6) :]))
    told = strange(draw, SUMMARY) | {"status": draw.choice(["finished", "failed", 5, None])}
    (folder / "summary.json").write_text(draw.choice([json.dumps(told), "{", "[" * 10**5]))


@pytest.mark.parametrize("seed", [4, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 1, 2, 3, 5))])
def test_rows_of_any_kind_make_reports_and_tables(tmp_path, seed, capsys):
    draw = random.Random(seed)
    for number in range(2):
        fill(tmp_path / str(number), draw)
    report([str(tmp_path)])
    sweep([str(tmp_path)])
    assert (tmp_path / "report.html").stat().st_size > 1000 and (tmp_path / "summary.md").exists()
    assert "2 run(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "largest", [1e308, *(pytest.param(each, marks=pytest.mark.slow) for each in (math.inf, math.nan))]
)
def test_a_run_whose_rewards_are_as_large_as_floats_has_its_curves(tmp_path, largest):
    rows = [{"step": n, "train/reward": (-1) ** n * largest, "eval/reward": largest} for n in range(1200)]
    rows += [{"step": 1200 + n, "seconds/step": 1.0, "seconds/learn": largest} for n in range(2)]
    plot_curves(rows, tmp_path / "curves.png", "large")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert summarise(rows)["reward_end"] == pytest.approx(largest, nan_ok=True)


def test_the_mean_of_numbers_whose_sum_is_none():
    assert mean_of([1e308, 1e308]) == 1e308 and mean_of([1e308, -1e308]) == 0.0
    assert math.isnan(mean_of([math.inf, -math.inf])) and mean_of([1, math.inf]) == math.inf
    assert mean_of([0.1, 0.2, 0.4]) == statistics.fmean([0.1, 0.2, 0.4])


def test_steps_without_the_time_of_a_transfer_or_of_tokens_are_summarised():
    assert summarise([{"step": 1, "seconds/step": 0.0}])["transfer_share"] == 0.0


@pytest.mark.timeout(20)
def test_a_fifo_in_place_of_a_file_is_not_waited_for(tmp_path):
    (tmp_path / ".hydra").mkdir()
    for name in (
        ".hydra/config.yaml",
        ".hydra/overrides.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "lanes.jsonl",
        "summary.json",
    ):
        os.mkfifo(tmp_path / name)
    run = read_run(tmp_path)
    assert (run.rows, run.samples(), run.summary, run.overrides, run.config) == ([], [], {}, [], {})
    assert run.lanes().lines == []
