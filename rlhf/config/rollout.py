"""What samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rlhf.config.model import Precision
from rlhf.config.rules import at_least, in_range
from transfer.agreement.shown import shown
from transfer.config import InFlight, positive


class Logprobs(Enum):
    """Which rows the workers tell the log-probs of; `rlhf.config.all_logprobs` says what `auto` is in a run."""

    auto = "auto"  # all, where the objective computes with them or they cost nothing; else a sample
    all = "all"
    sample = "sample"  # every 16th row, and at least 32 a step: enough for train/mismatch and its alarm


@dataclass(slots=True, kw_only=True)
class AheadConfig:
    """Samples are drawn while the step before is learned from, by weights that are `lag` versions behind."""

    lag: int = 0  # 0: a step's samples are drawn when it begins; 1: while the step before is learned from

    def __post_init__(self) -> None:
        in_range("rollout.ahead.lag", self.lag, 0, 1)


@dataclass(slots=True, kw_only=True)
class RolloutConfig:
    """Rollout workers, each a process with a policy of its own."""

    workers: int = 1
    gpus: list[int] | None = None  # of the workers, in turn; null: one after the other where weights are copied
    restarts: int = 2  # how often each worker that dies is started again; 0: the run ends with it
    in_flight: InFlight = InFlight.wait  # completions that are being sampled when new weights arrive
    ahead: AheadConfig = field(default_factory=AheadConfig)
    mismatch_alarm: float | None = 0.1  # as `alarms`: log-probs of worker and trainer differ; mean, nats a token
    logprobs: Logprobs = Logprobs.auto  # rows whose log-probs the workers tell; rollout=vllm is faster without
    max_new_tokens: int = 16
    temperature: float = 1.0
    dtype: Precision | None = None  # null: the policy's own
    rows_per_request: int = 1024  # bounds a worker's memory; the samples are the same for any value
    timeout_s: float = 300.0  # deadline of one request, seconds

    def __post_init__(self) -> None:
        at_least("rollout.workers", self.workers, 1)
        if self.gpus is not None and min(self.gpus, default=-1) < 0:
            raise ValueError(f"rollout.gpus must be GPUs by their numbers from 0, like [1] (got {self.gpus})")
        at_least("rollout.restarts", self.restarts, 0)
        if self.mismatch_alarm is not None:
            positive("rollout.mismatch_alarm", self.mismatch_alarm)
        at_least("rollout.max_new_tokens", self.max_new_tokens, 1)
        at_least("rollout.rows_per_request", self.rows_per_request, 1)
        positive("rollout.temperature", self.temperature)
        positive("rollout.timeout_s", self.timeout_s)

    @property
    def gpus_each(self) -> int:
        """How many GPUs a worker computes on."""
        return 1


@dataclass(slots=True, kw_only=True)
class HfRolloutConfig(RolloutConfig):
    """Engine `hf`: transformers models with a key/value cache, one prefill a prompt."""


OWN_ARGS = (
    "model",
    "tokenizer",
    "load_format",
    "dtype",
    "skip_tokenizer_init",
    "worker_extension_cls",
    "logprobs_mode",
    "trust_remote_code",
)


@dataclass(slots=True, kw_only=True)
class VllmRolloutConfig(RolloutConfig):
    """Engine `vllm`: each worker is a process (or a Ray actor) that holds a `vllm.LLM`; needs vLLM 0.24 or later.

    Weights are copied into vLLM's own memory: transfer.take=copy.
    """

    engine_args: Any = None  # of vllm.LLM, as {gpu_memory_utilization: 0.4, enforce_eager: true}; null: its defaults;
    # what decides about weights and samples is set here: model, dtype, logprobs, the loading of weights
    serve: bool = False  # start `vllm serve` and drive its own routes, in place of a worker process around vllm.LLM
    sleep_level: int = 0  # while the trainer learns, on one GPU: 1 moves vLLM's weights to the host, 2 drops them
    found_paused: bool = False  # servers of transfer.sender.url: a trainer that died may have left them paused
    keep_prefix_cache: bool = False  # across updates: what is found there was computed with older weights

    @property
    def gpus_each(self) -> int:
        """How many GPUs a worker computes on."""
        sizes = [self.engine_args.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data")]
        return math.prod(size for size in sizes if isinstance(size, int) and size > 0)

    def __post_init__(self) -> None:
        RolloutConfig.__post_init__(self)
        self.engine_args = {} if self.engine_args is None else self.engine_args
        if not isinstance(self.engine_args, dict) or not all(isinstance(key, str) for key in self.engine_args):
            raise ValueError(
                f"rollout.engine_args must be like {{gpu_memory_utilization: 0.4}} (got {shown(self.engine_args)})"
            )
        if taken := [key for key in OWN_ARGS if key in self.engine_args]:
            raise ValueError(
                f"rollout.engine_args.{taken[0]} is set by the harness: leave it out (the dtype is "
                "rollout.dtype, and model.trust_remote_code lets a checkpoint's own code run)"
            )
        in_range("rollout.sleep_level", self.sleep_level, 0, 2)
