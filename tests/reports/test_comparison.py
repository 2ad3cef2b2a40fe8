"""The plot of a sweep: which jobs are one line, what the line is, and that jobs that died spoil none of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.reports.comparison import lines_of, measured, plot_comparison
from rlhf.reports.run_folder import RunFolder, read_run
from rlhf.reports.summary import PHASES, write_summary


def job(folder: Path, overrides: list[str], gold: dict[int, float], transfer: float = 0.005) -> Path:
    """A finished job's folder with these evaluations, and a step of 0.1 s and the transfer after each."""
    folder.mkdir(parents=True)
    rows = [{"step": step, "eval/gold": value} for step, value in gold.items()]
    rows += [
        {"step": step, "seconds/learn": 0.1, "seconds/transfer": transfer, "seconds/step": 0.1 + transfer}
        for step in gold
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_summary(folder, "finished", overrides, {})
    return folder


@pytest.fixture
def jobs(tmp_path):
    """Two algorithms, two seeds each; the second seed of ppo died after step 10."""
    both = ["task=sort", "steps=20"]
    return [
        job(tmp_path / "0", [*both, "algo=grpo", "seed=0"], {0: 0.2, 10: 0.4, 20: 0.8}),
        job(tmp_path / "1", [*both, "algo=grpo", "seed=1"], {0: 0.4, 10: 0.6, 20: 1.0}, transfer=0.015),
        job(tmp_path / "2", [*both, "algo=ppo", "seed=0"], {0: 0.1, 10: 0.3, 20: 0.5}),
        job(tmp_path / "3", [*both, "algo=ppo", "seed=1"], {0: 0.3, 10: 0.5}),
    ]


def read(jobs: list[Path]) -> list[RunFolder]:
    return list(map(read_run, jobs))


def of(jobs: list[Path]):
    return lines_of(read(jobs))


def test_jobs_that_differ_in_their_seed_are_one_line_named_by_what_only_it_was_told(jobs):
    common, lines = of(jobs)
    assert common == ["task=sort", "steps=20"]
    assert [(line.label, len(line.runs)) for line in lines] == [("algo=grpo", 2), ("algo=ppo", 2)]


def test_a_line_has_the_values_of_all_its_seeds_and_ends_where_the_first_of_them_does(jobs):
    _, (grpo, ppo) = of(jobs)
    assert grpo.curve("eval/gold") == ([0, 10, 20], [[0.2, 0.4], [0.4, 0.6], [0.8, 1.0]])
    assert ppo.curve("eval/gold") == ([0, 10], [[0.1, 0.3], [0.3, 0.5]])
    assert grpo.milliseconds("transfer") == pytest.approx(10.0) and grpo.milliseconds("sample") == 0.0


def test_a_job_that_has_logged_nothing_is_not_drawn_and_the_plot_is_all_the_same(jobs, tmp_path):
    (tmp_path / "4").mkdir()
    write_summary(tmp_path / "4", "failed", ["task=sort", "steps=20", "algo=rloo", "seed=0"], {"error": "it died"})
    every = [*jobs, tmp_path / "4"]
    assert [line.label for line in measured(of(every)[1])] == ["algo=grpo", "algo=ppo"]
    plot_comparison(read(every), tmp_path / "comparison.png")
    plot_comparison(read([tmp_path / "4"]), tmp_path / "empty.png")
    assert (tmp_path / "comparison.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 1000


def test_the_bars_show_a_steps_phases_the_milliseconds_of_the_transfer_and_its_stall(jobs, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plain = {}, Axes.barh
    monkeypatch.setattr(
        Axes, "barh", lambda self, y, width, **o: drawn.update({o["label"]: width}) or plain(self, y, width, **o)
    )
    plot_comparison(read(jobs), tmp_path / "comparison.png")
    assert tuple(drawn) == (*PHASES, "Transfer, ms a step", "Stall, % of a step")
    assert drawn["Transfer, ms a step"] == pytest.approx([10.0, 5.0])
    assert drawn["Stall, % of a step"] == pytest.approx([100 * 0.06 / 0.66, 100 * 0.025 / 0.525])
