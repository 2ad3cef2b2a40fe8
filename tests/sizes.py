"""Long tests have two sizes: what CI runs (`slow`), and the full one that `pytest -m soak` runs."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest

LIMIT_S = 600
SEEDS = [
    pytest.param(0, marks=[pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(LIMIT_S)]),
    *(pytest.param(seed, marks=[pytest.mark.soak, pytest.mark.timeout(LIMIT_S)]) for seed in (1, 2)),
]


def in_ci(value: Any) -> Any:
    """A value of a parameter with which CI runs the test."""
    return pytest.param(value, marks=[pytest.mark.slow, pytest.mark.timeout(LIMIT_S)])


def in_full(value: Any, limit_s: int = LIMIT_S) -> Any:
    """A value of a parameter with which the test has its full size, and so many seconds."""
    return pytest.param(value, marks=[pytest.mark.soak, pytest.mark.timeout(limit_s)])


def sized(values: Iterable[Any], less: Container[Any]) -> list[Any]:
    """Values of a parameter of which CI does without some; `pytest -m soak` takes these."""
    return [in_full(value) if value in less else in_ci(value) for value in values]
