"""What samples."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config.model import Precision
from rlhf.rules import at_least
from transfer.config import InFlight, positive


@dataclass(slots=True, kw_only=True)
class RolloutConfig:
    """Rollout workers, each a process with a policy of its own."""

    workers: int = 1
    restarts: int = 2  # how often each worker that dies is started again; 0: the run ends with it
    in_flight: InFlight = InFlight.wait  # completions that are being sampled when new weights arrive
    mismatch_alarm: float | None = 0.1  # as `alarms`: log-probs of worker and trainer differ; mean, nats a token
    max_new_tokens: int = 16
    temperature: float = 1.0
    dtype: Precision | None = None  # null: the policy's own
    rows_per_request: int = 1024  # bounds a worker's memory; the samples are the same for any value
    timeout_s: float = 300.0  # deadline of one request, seconds

    def __post_init__(self) -> None:
        at_least("rollout.workers", self.workers, 1)
        at_least("rollout.restarts", self.restarts, 0)
        if self.mismatch_alarm is not None:
            positive("rollout.mismatch_alarm", self.mismatch_alarm)
        at_least("rollout.max_new_tokens", self.max_new_tokens, 1)
        at_least("rollout.rows_per_request", self.rows_per_request, 1)
        positive("rollout.temperature", self.temperature)
        positive("rollout.timeout_s", self.timeout_s)


@dataclass(slots=True, kw_only=True)
class HfRolloutConfig(RolloutConfig):
    """Engine `hf`: transformers models with a key/value cache, one prefill a prompt."""
