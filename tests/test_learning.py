"""What RL reaches from random weights: `python -m rlhf.train experiment=from_scratch algo=... task=... seed=...`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import pytest

from rlhf.report import series
from rlhf.run import run

Rows = list[dict[str, float]]
SEEDS = (0, 1, 2)
OTHERS = ("dr_grpo", "rloo", "reinforce_pp", "dapo", "gspo", "cispo", "ppo")
WINDOW = 5  # steps whose mean is the reward reached: one step alone may be lucky
MOST_SAMPLES = 1.5  # PPO's, in GRPO's

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def done() -> dict[tuple[str, ...], Rows]:
    """The runs so far: several tests look at one."""
    return {}


@pytest.fixture
def trained(compose_run, tmp_path, done) -> Callable[..., Rows]:
    """`trained("algo=ppo", "seed=1")`: the metrics of that run, which took `steps` steps as configured."""

    def rows(*overrides: str) -> Rows:
        if overrides not in done:
            config = compose_run("experiment=from_scratch", "logger=jsonl", "transfer=local", *overrides)
            run(config, tmp_path)
            done[overrides] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
            assert len(series(done[overrides], "train/gold")[0]) == config.steps
        return done[overrides]

    return rows


def reached(rows: Rows, bar: float) -> float:
    """The first step at whose end the mean score of `WINDOW` steps is above the bar; infinity where none is."""
    steps, gold = series(rows, "train/gold")
    for step, end in zip(steps[WINDOW - 1 :], range(WINDOW, len(gold) + 1), strict=True):
        if statistics.fmean(gold[end - WINDOW : end]) > bar:
            return step
    return float("inf")


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_learns_to_reverse_four_letters_within_120_steps(trained, seed):
    assert reached(trained("algo=grpo", "task=reverse", f"seed={seed}"), 0.9) <= 120


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("algo", OTHERS)
def test_every_other_algorithm_learns_it_within_200_steps(trained, algo, seed):
    assert reached(trained(f"algo={algo}", "task=reverse", f"seed={seed}"), 0.85) <= 200


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_sorts_four_letters_greedily(trained, seed):
    rows = trained("algo=grpo", "task=sort", f"seed={seed}")
    assert series(rows, "eval/greedy_accuracy")[1][-1] > 0.9
    assert sum(series(rows, "seconds/step")[1]) < 90


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", ["reverse", "sort"])
def test_ppo_reaches_what_grpo_reaches_within_half_as_many_samples_again(trained, task, seed):
    grpo, ppo = (trained(f"algo={algo}", f"task={task}", f"seed={seed}") for algo in ("grpo", "ppo"))
    assert reached(ppo, 0.9) <= MOST_SAMPLES * reached(grpo, 0.9) < float("inf")
    assert statistics.fmean(series(ppo, "train/explained_variance")[1][-20:]) > 0.2
