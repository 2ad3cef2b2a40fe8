"""Others' parts, tried on almost nothing before anything is trained: what they make is what a run needs of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.config import RunConfig
from rlhf.config.algo import AlgoConfig
from rlhf.learning.estimates import Signal, estimate
from rlhf.learning.objective import policy_loss
from rlhf.plugins.part import Part, PartError
from rlhf.plugins.registry import find, part_of
from transfer.agreement.shown import told

P, N, T = 2, 2, 3  # prompts, samples a prompt, tokens


def check_parts(config: RunConfig) -> None:
    """PartError if a part of others cannot be imported, or does not make what parts of its kind make."""
    if isinstance(config.algo, AlgoConfig):
        _try(find("advantage", config.algo.advantage), _advantage, config.algo)
        _try(find("loss", config.algo.loss), _loss, config.algo)
    _try(part_of(config.optim), _optimizer, config.optim)
    for named in config.reward.weighted().values():
        if not (part := part_of(named.reward)).ours:
            part.maker()
            part.checker()
    for logger in config.logger.values():
        if (part := part_of(logger)).make is not None:
            part.maker()


def _try(part: Part, trial: Callable[[Part, Any], str | None], config: Any) -> None:
    if part.ours:
        return
    part.maker()
    try:
        wrong = trial(part, config)
    except Exception as error:  # whatever the part raises
        raise PartError(f"{part.chosen} ({part.where}) fails on a trial of {P * N} rows: {told(error)}") from error
    if wrong:
        raise PartError(f"{part.chosen} ({part.where}) {wrong}")


def _advantage(part: Part, algo: AlgoConfig) -> str | None:
    mask_BT = torch.ones(P * N, T)
    values_BT = torch.zeros_like(mask_BT) if algo.has_critic else None
    signal = Signal(torch.tensor([0.0, 1.0] * P), torch.zeros_like(mask_BT), mask_BT, P, values_BT)
    advantages_BT, returns_BT = estimate(algo, signal)
    if not _is_like(advantages_BT, mask_BT):
        return f"must return a tensor of the rewards' shape, or one of the mask's (got {_shown(advantages_BT)})"
    if algo.has_critic and not _is_like(returns_BT, mask_BT):
        return f"must return returns of the mask's shape for its critic (got {_shown(returns_BT)})"
    return None


def _loss(part: Part, algo: AlgoConfig) -> str | None:
    old_BT = torch.full((P * N, T), -1.0)
    logprobs_BT = (old_BT + 0.1).requires_grad_()
    advantages_BT = torch.tensor([1.0, -1.0] * P)[:, None].expand(-1, T)
    loss_BT, delta_BT = policy_loss(algo, logprobs_BT, old_BT, advantages_BT, torch.ones_like(old_BT))
    if not (_is_like(loss_BT, old_BT) and _is_like(delta_BT, old_BT)):
        return f"must return a loss and a log-ratio of each token (got {_shown(loss_BT)} and {_shown(delta_BT)})"
    return None if loss_BT.requires_grad else "returns a loss without a gradient: compute it from logprobs_BT"


def _optimizer(part: Part, config: Any) -> str | None:
    """Its state is saved by the names of the parameters, as tensors of their shape."""
    weight = torch.zeros(2, 3, requires_grad=True)
    optimizer = part.maker()(config, [("weight", weight)], config.lr)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return f"must return a torch.optim.Optimizer (got {type(optimizer).__name__})"
    if any("param_names" not in group for group in optimizer.param_groups):
        return "must give its optimiser the named parameters as they are: checkpoints call its state by their names"
    weight.grad = torch.ones_like(weight)
    before = _dials(optimizer)
    optimizer.step()
    if _dials(optimizer) != before:
        return "changes its param_groups as it steps: no checkpoint holds that, so keep it in the state"
    held = {key: value for state in optimizer.state_dict()["state"].values() for key, value in state.items()}
    like = {"step": torch.zeros(())}
    unlike = [key for key, value in held.items() if not _is_like(value, like.get(key, weight))]
    return (
        f"keeps {', '.join(unlike)}, which is no tensor of its weight's shape and dtype: no checkpoint holds that"
        if unlike
        else None
    )


def _dials(optimizer: torch.optim.Optimizer) -> list[dict[str, str]]:
    return [{key: repr(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _is_like(value: Any, like: Tensor) -> bool:
    return isinstance(value, Tensor) and (value.shape, value.dtype) == (like.shape, like.dtype)


def _shown(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
