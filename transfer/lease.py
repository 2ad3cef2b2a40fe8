"""The clock of leases: it counts the time that a process was stopped, and the time that the machine slept."""

from __future__ import annotations

import time


def now() -> float:
    """Seconds since some moment; time.monotonic alone stands still while the machine is suspended."""
    return time.monotonic() + _slept()


def _slept() -> float:
    """How long this machine has been suspended since it was started, seconds; 0 where the kernel does not tell."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
