"""What RL reaches from random weights: `python -m rlhf.train experiment=from_scratch algo=... task=... seed=...`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import pytest

from rlhf.run import run
from rlhf.summary import series

Rows = list[dict[str, float]]
SEEDS = (0, 1, 2)
WINDOW = 5  # steps whose mean is the reward reached: one step alone may be lucky

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def trained(compose_run, tmp_path) -> Callable[..., Rows]:
    """`trained("algo=ppo", "seed=1")`: the metrics of that run, which took `steps` steps as configured."""

    def rows(*overrides: str) -> Rows:
        config = compose_run("experiment=from_scratch", "logger=jsonl", "transfer=local", *overrides)
        run(config, tmp_path)
        found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert len(series(found, "train/gold")[0]) == config.steps
        return found

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
