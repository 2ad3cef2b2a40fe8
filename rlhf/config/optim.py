"""The optimiser, and its learning rate over a run."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from rlhf.config.rules import at_least, in_range
from transfer.config import positive


class Schedule(enum.Enum):
    """How the learning rate goes on after its warm-up (schedules.py)."""

    constant = "constant"
    linear = "linear"  # down to 0 after the last step
    cosine = "cosine"


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """The policy's optimiser."""

    lr: float = 2e-4
    max_grad_norm: float = 1.0
    schedule: Schedule = Schedule.constant  # of RL; the other stages have their own
    warmup_steps: int = 0  # in which the rate grows to lr
    master_weights: bool = True  # step fp32 copies of weights that are not: bfloat16 rounds small steps away

    def __post_init__(self) -> None:
        at_least("optim.warmup_steps", self.warmup_steps, 0)
        positive("optim.lr", self.lr)
        positive("optim.max_grad_norm", self.max_grad_norm)


@dataclass(slots=True, kw_only=True)
class AdamWConfig(OptimConfig):
    """Decoupled weight decay (arXiv:1711.05101)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        OptimConfig.__post_init__(self)
        in_range("optim.beta1", self.beta1, 0.0, 1.0)
        in_range("optim.beta2", self.beta2, 0.0, 1.0)
