"""Rules for the numbers of a configuration; a message says what was given, and what is allowed, for which key."""

from __future__ import annotations


def at_least(key: str, value: float, least: float) -> None:
    """Raise ValueError unless `value` >= `least`."""
    if not value >= least:
        raise ValueError(f"{key} must be at least {least} (got {value})")


def in_range(key: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless `low` <= `value` <= `high`."""
    if not low <= value <= high:
        raise ValueError(f"{key} must be between {low} and {high} (got {value})")


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)} (got {value!r})")
