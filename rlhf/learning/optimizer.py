"""The optimiser that a configuration names, and the fp32 weights that it steps where a model's own are coarser."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.config import AdamWConfig, OptimConfig
from rlhf.plugins.registry import made
from transfer.agreement.dtensor import local_part

REGISTER = 64  # elements: any CPU's vector register holds as many, or a fraction
EPS = 1e-6  # added to a norm that is divided by, as torch does
Named = list[tuple[str, Tensor]]  # parameters by the names that a checkpoint calls their state by


def make_optimizer(model: torch.nn.Module, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """The optimiser that `config` names, over all parameters of `model` that learn, or over fp32 masters of them."""
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    masters: Sequence[Tensor] = [_master(p) for p in parameters] if config.master_weights else parameters
    named: Named = list(zip(names, masters, strict=True))
    optimizer: torch.optim.Optimizer = made(config, named, lr)
    _connect([(p, m) for p, m in zip(parameters, masters, strict=True) if p is not m], optimizer)
    return optimizer


def adamw(config: AdamWConfig, named: Named, lr: float) -> torch.optim.Optimizer:
    """Decoupled weight decay; what a step makes of a row does not depend on the rows beside it, which a rank may lack.

    On a CPU torch's fused kernel rounds the last elements of a tensor in another way than those before, if they fill no
    register: so it is left out where rows do not fill registers.
    """
    fused: list[tuple[str, Any]] = [(name, tensor) for name, tensor in named if _fills_registers(tensor)]
    others = [(name, tensor) for name, tensor in named if not _fills_registers(tensor)]
    groups: list[dict[str, Any]] = [{"params": fused, "fused": True}, {"params": others, "foreach": True}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def _fills_registers(tensor: Tensor) -> bool:
    return tensor.is_cuda or (tensor.dim() > 1 and math.prod(tensor.shape[1:]) % REGISTER == 0)


@torch.no_grad()
def clip_gradients(
    optimizer: torch.optim.Optimizer, max_norm: float, over_ranks: Callable[[float], float] = lambda squares: squares
) -> float:
    """Scale the gradients that `optimizer` is about to step along to a norm of at most `max_norm`; what it was.

    Squares are added up in fp64, so that the norm, an fp32 number, does not depend on how tensors are split;
    `over_ranks` adds those of the shards of other ranks.
    """
    gradients = [local_part(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return 0.0
    norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients])
    norm = float(torch.tensor(math.sqrt(over_ranks(float(norms.square().sum()))), dtype=torch.float32))
    if norm + EPS > max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + EPS))
    return norm


def _master(parameter: Tensor) -> Tensor:
    return parameter if parameter.dtype == torch.float32 else parameter.detach().float().requires_grad_()


def _connect(pairs: list[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """Each master gets its parameter's gradients, one backward pass after the other, and gives it what a step makes.

    Gradients are added up in fp32, too: in bfloat16 a sum of micro-batches stops to grow after a few hundred.
    """
    if not pairs:
        return
    hooks = [parameter.register_post_accumulate_grad_hook(partial(_take, master)) for parameter, master in pairs]
    optimizer.register_step_post_hook(partial(_round, pairs))
    weakref.finalize(optimizer, _remove, hooks)  # one optimiser after the other may train a model


def _take(master: Tensor, parameter: Tensor) -> None:
    assert parameter.grad is not None, "two optimisers with master weights at once"
    gradient, parameter.grad = parameter.grad.float(), None
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)


@torch.no_grad()
def _round(pairs: list[tuple[Tensor, Tensor]], *_: Any) -> None:
    for parameter, master in pairs:
        parameter.copy_(master)


def _remove(hooks: Iterable[torch.utils.hooks.RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
