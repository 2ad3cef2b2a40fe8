"""Learning-rate schedules: what the configured rate is multiplied by."""

from __future__ import annotations

import math

from rlhf.config import Schedule


def scale(schedule: Schedule, step: int, steps: int, warmup: int) -> float:
    """The factor in step `step` of 0 .. `steps` - 1: up to 1 in `warmup` steps, then down to 0 after the last."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = 1 - (step - warmup) / max(1, steps - warmup)
    match schedule:
        case Schedule.constant:
            return 1.0
        case Schedule.linear:
            return left
        case Schedule.cosine:
            return (1 + math.cos(math.pi * (1 - left))) / 2
