"""The clock of leases: it counts the time that a process was stopped, and the time that the machine slept."""

from __future__ import annotations

import time

CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the latter stands still while the machine is suspended


def now() -> float:
    """Seconds since some moment."""
    return time.clock_gettime(CLOCK)
