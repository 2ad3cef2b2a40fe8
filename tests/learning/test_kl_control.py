"""The coefficient of the KL penalty."""

import pytest

from rlhf.learning.kl_control import KlController


@pytest.mark.parametrize(("kl", "expected"), [(3, 0.198976), (6, 0.2), (6.6, 0.200512), (12, 0.201024)])
def test_the_adaptive_coefficient_matches_the_golden_numbers(kl, expected):
    controller = KlController(0.2, target=6.0, horizon=10000)
    controller.observe(kl, rows=256)
    assert controller.coefficient == pytest.approx(expected, abs=1e-7)


def test_a_fixed_coefficient_stays():
    controller = KlController(0.2)
    controller.observe(100.0, rows=256)
    assert controller.coefficient == 0.2


def test_a_kl_that_answers_to_its_coefficient_settles_at_the_target():
    controller = KlController(0.01, target=2.0, horizon=1000)
    for _ in range(2000):
        controller.observe(1.0 / controller.coefficient, rows=256)
    assert 1.0 / controller.coefficient == pytest.approx(2.0, rel=1e-3)
