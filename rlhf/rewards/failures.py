"""Samples without a reward, and answers that are no rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlhf.ending import RunError


def usable(rewards_B: Sequence[float | None], max_failed: float, error: str = "") -> list[float | None]:
    """The rewards [B], if at most the share `max_failed` is missing; RunError, with `error` as its reason, if not."""
    missing = sum(reward is None for reward in rewards_B)
    if missing / max(1, len(rewards_B)) <= max_failed:
        return list(rewards_B)
    reason = error or (
        "check that the task's rows have what the reward needs (an answer column, say), or choose another reward"
    )
    raise RunError(
        f"{missing} of {len(rewards_B)} samples have no reward (None), and at most {max_failed:.0%} may "
        f"(reward.max_failed): {reason}"
    )


def as_rewards(source: str, given: Any, expected: int) -> list[float | None]:
    """What `source` returned, as rewards [expected]; ValueError unless it is a list of finite numbers or None."""
    if not isinstance(given, (list, tuple)) or len(given) != expected:
        got = f"{len(given)} values" if isinstance(given, (list, tuple)) else type(given).__name__
        raise ValueError(f"{source} must return a list of {expected} numbers or None (got {got})")
    for value in given:
        if value is not None and not _finite(value):
            raise ValueError(f"{source} must return finite numbers or None (got {value!r:.100})")
    return [None if value is None else float(value) for value in given]


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
