"""When the alarms of a run fire; what each looks at is in monitor/alarms.py."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config.rules import at_least, in_range
from transfer.config import positive


@dataclass(slots=True, kw_only=True)
class AlarmsConfig:
    """When each alarm fires; null turns it off (`rollout.mismatch_alarm` is the dial of one more)."""

    no_signal: float | None = 0.9  # share of prompts whose samples all have one reward
    gradient: float | None = 0.0  # norm of the policy's gradient, at or below; and where an update was skipped
    nan: int | None = 0  # metrics that are not finite; and rewards that were not, whose samples are left out
    kl: float | None = 1.0  # KL to the reference, nats a token
    kl_jump: float | None = 5.0  # the same, in medians of the 20 steps before
    entropy: float | None = 0.1  # entropy, in first values, below
    truncated: float | None = 0.5  # share of rows that the length limit has cut
    length: float | None = 3.0  # tokens a row, in first values, where they are near rollout.max_new_tokens, too
    ess: float | None = 0.5  # effective share of the samples, below in 5 steps in a row
    lag: float | None = None  # versions that tokens are behind on average, above in 5 steps in a row
    overoptimisation: float | None = 3.0  # standard errors by which evaluations' reward rises while their gold falls
    stop: bool = False  # whether an alarm ends the run

    def __post_init__(self) -> None:
        for key in ("no_signal", "entropy", "truncated", "ess"):
            if (value := getattr(self, key)) is not None:
                in_range(f"alarms.{key}", value, 0.0, 1.0)
        for key in ("gradient", "nan", "lag"):
            if (value := getattr(self, key)) is not None:
                at_least(f"alarms.{key}", value, 0)
        for key in ("kl", "overoptimisation"):
            if (value := getattr(self, key)) is not None:
                positive(f"alarms.{key}", value)
        for key in ("kl_jump", "length"):
            if (value := getattr(self, key)) is not None:
                at_least(f"alarms.{key}", value, 1)
