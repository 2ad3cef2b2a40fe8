"""How old the tokens are that a step learns from."""

from __future__ import annotations

import pytest

from rlhf.monitor.metrics import Outlets, Recorder
from rlhf.monitor.progress import Bars
from rlhf.shell.ending import RunError
from rlhf.types import Completion, Prompt, Rollouts
from transfer.agreement.journal import Journal

OWN = Completion([5, 6, 7], [-1.0] * 3, [7, 7, 6], "stop")
TOLD = Completion([5, 9, 9, 7], [-1.0, 0.0, 0.0, -1.0], [7, 7, 7, 5], "stop", [1, 0, 0, 1])


@pytest.fixture
def recorder(compose_run, tmp_path):
    def made(lag: int) -> Recorder:
        outlets = Outlets([], tmp_path, Bars(False).stage("grpo", 1), Journal(tmp_path / "journal.jsonl"))
        record = Recorder(outlets, None, compose_run())
        record.most_lag = lag
        return record

    return made


def rollouts(*completions: Completion) -> Rollouts:
    return Rollouts([Prompt("x", (1,))], list(completions), ["a"] * len(completions), [3], len(completions))


def test_where_steps_are_sampled_ahead_each_age_has_its_share_of_the_tokens_that_were_sampled(recorder):
    record = recorder(3)
    record.took(rollouts(OWN, TOLD), 7)
    ages = {"rollout/lag_0": 0.6, "rollout/lag_1": 0.2, "rollout/lag_2": 0.2, "rollout/lag_3": 0.0}
    assert record.lag == pytest.approx({"rollout/lag": 0.6, "rollout/lag_max": 2.0} | ages)
    with pytest.raises(RunError, match=r"more than 3 versions before \(rollout\.ahead\)"):
        record.took(rollouts(OWN, TOLD), 9)


def test_where_nothing_is_sampled_ahead_there_are_no_shares(recorder):
    record = recorder(0)
    record.took(rollouts(Completion([5], [-1.0], [7], "stop")), 7)
    assert record.lag == {"rollout/lag": 0.0, "rollout/lag_max": 0.0}
