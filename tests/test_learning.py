"""What RL reaches from random weights: `python -m rlhf.train experiment=from_scratch algo=... task=... seed=...`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from sizes import SEEDS

from rlhf.monitor.metrics import Recorder
from rlhf.reports.summary import series
from rlhf.run import run

MOST_SAMPLES = 1.5  # PPO's, in GRPO's


@dataclass(frozen=True, slots=True)
class Learned:
    """When a run had what it was to reach."""

    steps: int
    cpu_s: float  # of its one process, on a machine that may have other work


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric, and of how many of its values in a row the mean counts: one step alone may be lucky."""

    name: str
    window: int


GOLD, GREEDY = Measure("train/gold", 5), Measure("eval/greedy_accuracy", 1)


class Reached(BaseException):
    """Ends a run at this step; no Exception, which some of its parts outlive."""


@pytest.fixture
def learned(compose_run, tmp_path, monkeypatch) -> Callable[..., Learned]:
    """`learned(GOLD, 0.9, "algo=ppo", ...)`: trains until the mean of a few of its last values is above the bar."""
    runs: list[tuple[Measure, float]] = []
    step = Recorder.step

    def watched(recorder: Recorder, *args: object) -> None:
        step(recorder, *args)
        measure, bar = runs[-1]
        values = series(recorder.rows, measure.name)[1][-measure.window :]
        if len(values) == measure.window and statistics.fmean(values) > bar:
            raise Reached(series(recorder.rows, "train/gold")[0][-1])

    monkeypatch.setattr(Recorder, "step", watched)

    def until(measure: Measure, bar: float, *overrides: str) -> Learned:
        runs.append((measure, bar))
        config = compose_run("experiment=from_scratch", "logger=jsonl", "transfer=local", *overrides)
        began = time.process_time()
        with pytest.raises(Reached) as reached:
            run(config, tmp_path / str(len(runs)))
        return Learned(reached.value.args[0], time.process_time() - began)

    return until


@pytest.fixture(scope="module")
def grpo_steps() -> dict[tuple[str, int], int]:
    """What GRPO has taken to 0.9 in the tests before, by task and seed."""
    return {}


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_learns_to_reverse_four_letters_within_120_steps_and_20_seconds(learned, grpo_steps, seed):
    took = learned(GOLD, 0.9, "algo=grpo", "task=reverse", f"seed={seed}")
    grpo_steps["reverse", seed] = took.steps
    assert took.steps <= 120 and took.cpu_s <= 20


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("algo", ["dr_grpo", "rloo", "reinforce_pp", "dapo", "gspo", "cispo"])
def test_every_other_algorithm_learns_to_reverse_four_letters_within_200_steps(learned, algo, seed):
    assert learned(GOLD, 0.85, f"algo={algo}", "task=reverse", f"seed={seed}").steps <= 200


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_learns_to_sort_four_letters_that_it_has_never_seen_within_90_seconds(learned, grpo_steps, seed):
    took = learned(GREEDY, 0.9, "algo=grpo", "task=sort", f"seed={seed}")
    assert took.cpu_s <= 90
    grpo_steps["sort", seed] = learned(GOLD, 0.9, "algo=grpo", "task=sort", f"seed={seed}").steps


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", ["reverse", "sort"])
def test_ppo_reaches_what_grpo_reaches_within_half_as_many_samples_again(learned, grpo_steps, task, seed):
    run_of = (GOLD, 0.9, f"task={task}", f"seed={seed}")
    grpo = grpo_steps.get((task, seed)) or learned(*run_of, "algo=grpo").steps
    assert learned(*run_of, "algo=ppo").steps <= MOST_SAMPLES * grpo
