"""The optimiser that a configuration names."""

from __future__ import annotations

import torch

from rlhf.config import AdamWConfig, OptimConfig


def make_optimizer(model: torch.nn.Module, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """The optimiser that `config` names, over all parameters of `model`."""
    match config:
        case AdamWConfig():
            betas = (config.beta1, config.beta2)
            return torch.optim.AdamW(
                model.parameters(), lr=lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
            )
    raise AssertionError(config)
