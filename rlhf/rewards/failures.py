"""Samples without a reward, and answers that are no rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

from rlhf.shell.ending import RunError
from rlhf.types import RewardReport
from transfer.agreement.shown import shown

NOT_FINITE = "not_finite"  # of RewardReport.counts: NaN or infinity;
TIMED_OUT = "timed_out"  # no answer within reward.timeout_s;
RAISED = "raised"  # an exception, or the end of the process;
REFUSED = "refused"  # a server said no, or was not there;
NOT_A_NUMBER = "not_a_number"  # an answer that holds no reward, a text, say


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


def lost(report: RewardReport, what: str, samples: int, error: str) -> None:
    """Note that so many samples have no reward, by what befell them."""
    report.counts[what] = report.counts.get(what, 0) + samples
    report.errors = (report.errors or 0) + samples
    report.error = error


def as_rewards(source: str, given: Any, expected: int, report: RewardReport) -> list[float | None]:
    """What `source` returned, as rewards [expected]: a list or an array of numbers of any kind, or None.

    NaN, infinity and whatever else is no number are no rewards, and are counted in `report`; ValueError where there are
    not `expected` of them.
    """
    is_list = isinstance(given, (list, tuple)) or (hasattr(given, "tolist") and hasattr(given, "__len__"))
    values = _listed(given) if is_list else None
    if values is None or len(values) != expected:
        got = type(given).__name__ if values is None else f"{len(values)} values"
        raise ValueError(f"{source} must return a list of {expected} numbers or None (got {got})")
    return only_finite(source, [_number(source, value, report) for value in values], report)


def refuse_no_numbers(report: RewardReport) -> None:
    """ValueError where a trial has given what is no number."""
    if report.counts.get(NOT_A_NUMBER):
        raise ValueError(report.error)


def only_finite(source: str, rewards: Sequence[float | None], report: RewardReport) -> list[float | None]:
    """The rewards of `source`, of which NaN and infinity are none; how many were is counted in `report`."""
    lost = [reward for reward in rewards if reward is not None and not math.isfinite(reward)]
    if lost:
        report.counts[NOT_FINITE] = report.counts.get(NOT_FINITE, 0) + len(lost)
        report.error = report.error or f"{source} has given {lost[0]}, which is NaN or infinite and no reward"
    return [None if reward is None or not math.isfinite(reward) else reward for reward in rewards]


def _listed(given: Any) -> list[Any] | None:
    """The elements of a list or an array; None of an array without a dimension."""
    try:
        return list(given)
    except TypeError:
        return None


def _number(source: str, value: Any, report: RewardReport) -> float | None:
    """A number of Python, numpy, torch or decimal, or an array with one, as a float; None of whatever else."""
    try:
        told = value.item() if hasattr(value, "item") else value
        if isinstance(told, (Real, Decimal, type(None))):
            return None if told is None else float(told)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an integer beyond all floats; several numbers
        pass
    lost(report, NOT_A_NUMBER, 1, f"{source} must return finite numbers or None (got {shown(value, 100)})")
    return None
