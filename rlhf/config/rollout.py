"""What samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rlhf.config.cut import Cut
from rlhf.config.model import Precision
from rlhf.config.rules import at_least, in_range
from transfer.agreement.shown import shown
from transfer.config import InFlight, positive


class Logprobs(Enum):
    """Which rows the workers tell the log-probs of; `rlhf.config.all_logprobs` says what `auto` is in a run."""

    auto = "auto"  # all, where the objective computes with them or they cost nothing; else a sample
    all = "all"
    sample = "sample"  # every 16th row, and at least 32 a step: enough for train/mismatch and its alarm


class KvAfterUpdate(Enum):
    """What becomes of the key/value cache of completions that go on under new weights (`in_flight=keep`)."""

    keep = "keep"  # what older weights have computed stays: nothing is computed twice
    recompute = "recompute"  # prompt and answer so far are computed anew, so that log-probs are the new weights' own


MOST_LAG = 16  # versions; the slots of so many steps are in memory, and in each checkpoint


class Order(Enum):
    """In which order samples that were drawn ahead are learned from."""

    exact = "exact"  # each step has the samples of its own prompts, of weights that are known: runs repeat to the bit
    free = "free"  # groups are learned from as they come, from a queue, and new weights come while others are drawn


@dataclass(slots=True, kw_only=True)
class AheadConfig:
    """Samples are drawn while the trainer learns, by weights that are up to `lag` versions behind."""

    lag: int = 0  # 0: a step's samples are drawn when it begins; 1: while the step before is learned from; 2, ...: free
    order: Order = Order.exact  # free: a queue of (lag + 1) x prompts_per_step groups; no two runs are the same
    spread: bool = False  # a group's samples are drawn by several workers, so that one long row holds up fewer; free
    window: int = (
        0  # of order=free: groups that may overtake a slow one, which is then older by window / prompts_per_step
    )

    def __post_init__(self) -> None:
        in_range("rollout.ahead.lag", self.lag, 0, MOST_LAG)
        at_least("rollout.ahead.window", self.window, 0)
        if self.order is Order.exact and self.lag > 1:
            raise ValueError(
                f"in exact order a step is sampled while the one before is learned from, and no earlier: choose "
                f"rollout.ahead.lag=1, or rollout.ahead.order=free (got rollout.ahead.lag={self.lag})"
            )
        if self.spread and (self.order is Order.exact or not self.lag):
            raise ValueError(
                "rollout.ahead.spread=true draws a group by several workers while others are learned from: choose "
                "rollout.ahead.order=free and a lag of 1 or more, or leave it out"
            )
        if self.window and (self.order is Order.exact or not self.lag):
            raise ValueError(
                f"rollout.ahead.window={self.window} lets groups overtake each other in a queue: choose "
                "rollout.ahead.order=free and a lag of 1 or more, or leave it out"
            )

    def most_lag(self, size: int) -> int:
        """Versions that a token may be behind, where a step has `size` prompts."""
        return self.lag + -(-self.window // size)


@dataclass(slots=True, kw_only=True)
class RolloutConfig:
    """Rollout workers, each a process with a policy of its own."""

    workers: int = 1
    gpus: list[int] | None = None  # of the workers, in turn; null: one after the other where weights are copied
    restarts: int = 2  # how often each worker that dies is started again; 0: the run ends with it
    in_flight: InFlight = InFlight.wait  # completions that are being sampled when new weights arrive
    kv_after_update: KvAfterUpdate = KvAfterUpdate.keep  # the cache of those that go on under new weights
    ahead: AheadConfig = field(default_factory=AheadConfig)
    batch_invariant: bool | None = None  # bits of a row are the same whatever rows are beside it; null: on where a run
    # is exact only with it: ahead.lag=1 in exact order, engine hf, a CPU, threads=1
    mismatch_alarm: float | None = 0.1  # as `alarms`: log-probs of worker and trainer differ; mean, nats a token
    logprobs: Logprobs = Logprobs.auto  # rows whose log-probs the workers tell; rollout=vllm is faster without
    max_new_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0  # of an evaluation: the fewest likeliest tokens that have so much of the probability; 1: all
    top_k: int = 0  # of an evaluation: so many of the likeliest tokens; 0: all
    min_p: float = 0.0  # of an evaluation: tokens of so much of the likeliest one's probability; 0: all
    stop: list[str] = field(default_factory=list)  # texts that end an answer, with the token that completes one
    dtype: Precision | None = None  # null: the policy's own
    rows_per_request: int = 1024  # bounds a worker's memory; the samples are the same for any value
    timeout_s: float = 300.0  # deadline of one request, seconds

    def __post_init__(self) -> None:
        at_least("rollout.workers", self.workers, 1)
        if self.gpus is not None and min(self.gpus, default=-1) < 0:
            raise ValueError(f"rollout.gpus must be GPUs by their numbers from 0, like [1] (got {self.gpus})")
        at_least("rollout.restarts", self.restarts, 0)
        if self.kv_after_update is KvAfterUpdate.recompute and self.in_flight is not InFlight.keep:
            raise ValueError(
                "rollout.kv_after_update=recompute is for completions that go on under new weights, which "
                f"rollout.in_flight={self.in_flight.value} has none of: choose in_flight=keep, or leave it out"
            )
        if self.mismatch_alarm is not None:
            positive("rollout.mismatch_alarm", self.mismatch_alarm)
        at_least("rollout.max_new_tokens", self.max_new_tokens, 1)
        at_least("rollout.rows_per_request", self.rows_per_request, 1)
        positive("rollout.temperature", self.temperature)
        self.cut.check("rollout")
        if not all(self.stop):
            raise ValueError(f"rollout.stop must be texts of a character at least (got {self.stop})")
        positive("rollout.timeout_s", self.timeout_s)

    @property
    def cut(self) -> Cut:
        """Tokens that are never sampled."""
        return Cut(self.top_p, self.top_k, self.min_p)

    @property
    def gpus_each(self) -> int:
        """How many GPUs a worker computes on."""
        return 1

    @property
    def continuous(self) -> bool:
        """Whether rows of many requests share a worker's batch, which they join and leave at any time."""
        return False


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
    def continuous(self) -> bool:
        """vLLM's scheduler does that."""
        return True

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
