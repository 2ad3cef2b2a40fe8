"""Which GPUs a worker computes on: its own come first, and it sees all others behind them, whose memory it may read."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

from rlhf.config.rollout import RolloutConfig

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_to_workers(
    rollout: RolloutConfig,
    copied: bool,
    trainer: int = 0,
    taken: Collection[int] = (),
    variables: Mapping[str, str] = os.environ,
) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker; [] where all see what the trainer sees. ValueError for GPUs not found here.

    Without `rollout.gpus` workers take GPUs in turn where weights are `copied`, from the trainer's on, or its first
    rank's, of number `trainer`, and none that is `taken` while others are left; else all share the trainer's.
    """
    import torch

    count, each = torch.cuda.device_count(), rollout.gpus_each
    chosen = rollout.gpus
    if chosen is None:
        if count < 2 or not (copied or trainer):
            return []
        chosen = [trainer] * rollout.workers * each
        if copied:
            in_turn = [(trainer + index) % count for index in range(count)]
            free = [index for index in in_turn if index not in taken]
            free = free if len(free) >= each else in_turn
            chosen = [free[index % len(free)] for index in range(rollout.workers * each)]
    if each > count:
        raise ValueError(f"a worker of rollout.engine_args needs {each} GPUs, and {count} are visible here")
    if beyond := [index for index in chosen if index >= count]:
        raise ValueError(f"rollout.gpus names {beyond}, and {count} GPUs are visible here, from 0")
    names = [name.strip() for name in variables.get(VARIABLE, "").split(",") if name.strip()]
    names = names[:count] or list(map(str, range(count)))
    return [_ordered(names, chosen[start : start + each]) for start in range(0, len(chosen), each)]


def claim(visible: Sequence[str]) -> None:
    """Let this process see GPUs in its worker's order; before it asks CUDA for anything."""
    if visible:
        os.environ[VARIABLE] = visible[0]


def _ordered(names: Sequence[str], own: Sequence[int]) -> str:
    return ",".join([names[index] for index in own] + [name for i, name in enumerate(names) if i not in own])
