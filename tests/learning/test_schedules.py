"""Learning rates over a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import Schedule
from rlhf.learning.schedules import scale


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule.constant, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        (Schedule.linear, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        (Schedule.cosine, [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_rates_warm_up_and_then_follow_their_schedule(schedule, expected):
    assert [scale(schedule, step, 6, 2) for step in range(6)] == pytest.approx(expected, abs=1e-6)


@given(st.sampled_from(Schedule), st.integers(1, 100), st.integers(0, 120))
def test_every_step_has_a_rate_above_zero_and_at_most_the_configured_one(schedule, steps, warmup):
    assert all(0 < scale(schedule, step, steps, warmup) <= 1 for step in range(steps))
