"""Rules for the numbers of a configuration; a message says what was given, and what is allowed, for which key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf.shell.ending import RunError
from transfer.agreement.shown import shown


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
        raise ValueError(f"{key} must be one of {', '.join(allowed)} (got {shown(value)})")


@contextmanager
def named_as_part(name: str) -> Iterator[None]:
    """Errors about `reward.KEY` that leave the block are about `reward.parts.NAME.KEY`; "": they are as they are."""
    try:
        yield
    except (ValueError, RunError) as error:
        if not name:
            raise
        kind = RunError if isinstance(error, RunError) else ValueError
        raise kind(of_part(name, str(error))) from None


def of_part(name: str, message: str) -> str:
    """The message with the key that it begins with, `reward.KEY`, as that of a part of reward=sum."""
    return re.sub(r"^reward(?=[.=])", f"reward.parts.{name}", message)
