"""`trainer.gather=auto`: weights of shards are gathered once an update, unless a GPU's memory is too small for that.

Pure arithmetic, which imports no torch. Once an update is faster, or as fast; layer by layer needs the least memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

from rlhf.config import RunConfig, VllmRolloutConfig
from rlhf.config.model import AUTO
from rlhf.config.trainer import LAYER, STEP, ShardedConfig
from rlhf.preflight.memory_estimate import Sizes, human, trainer, worker
from transfer.config import HttpSenderConfig

SHARE = 0.85  # of a GPU's memory, for what the estimate knows; the rest is for activations
VLLM_SHARE = 0.9  # of a GPU's memory, where gpu_memory_utilization does not say


def chosen(config: RunConfig, counted: Callable[[], Sizes], ranks: int, memory: int | None) -> tuple[str, str]:
    """What `gather` is, and why, where that was left to the machine; `memory`: bytes of a rank's GPU, None on a CPU."""
    given = config.trainer
    assert isinstance(given, ShardedConfig)
    if given.gather != AUTO:
        return given.gather, ""
    if memory is None:
        return STEP, ""
    sizes, by_step = counted(), copy.copy(config)
    by_step.trainer = settled(given, STEP, on_gpu=True)
    need = sum(trainer(by_step, sizes, ranks).values())
    room = max(0, int(SHARE * memory) - _of_workers(config, sizes, ranks, memory))
    why = f"gather=step needs {human(need)} of a GPU's {human(memory)}, and {human(room)} are left for it"
    return STEP if need <= room else LAYER, why


def settled(given: ShardedConfig, gather: str, on_gpu: bool) -> ShardedConfig:
    """The trainer's configuration once `gather` is known; `reshard` is about layers, `offload` about GPUs."""
    reshard = given.reshard if gather == LAYER else None
    return replace(given, gather=gather, reshard=reshard, offload=given.offload and on_gpu)


def _of_workers(config: RunConfig, sizes: Sizes, ranks: int, memory: int) -> int:
    """Bytes that workers have of a rank's GPU while it learns."""
    rollout, sender = config.rollout, config.transfer.sender
    elsewhere = rollout.gpus is not None or (isinstance(sender, HttpSenderConfig) and bool(sender.url))
    if elsewhere:
        return 0
    if isinstance(rollout, VllmRolloutConfig):
        share = rollout.engine_args.get("gpu_memory_utilization", VLLM_SHARE)
        known = share if isinstance(share, (int, float)) else VLLM_SHARE
        return 0 if rollout.sleep_level else int(memory * known)
    return math.ceil(rollout.workers / ranks) * sum(worker(config, sizes).values())


def announced(settings: ShardedConfig, given: ShardedConfig, ranks: int, why: str) -> str:
    """How weights are gathered, in one line."""
    how = "layer by layer" if settings.by_layer else "once an update"
    kept = ", and kept between forward and backward passes" if settings.by_layer and settings.reshard is False else ""
    there = ", shards in the host's memory" if settings.offload else ""
    no = "; trainer.offload=true changes nothing on a CPU" if given.offload and not settings.offload else ""
    because = f": {why}" if why else ""
    return f"trainer: {ranks} ranks, weights gathered {how} (gather={settings.gather}){kept}{there}{because}{no}"
