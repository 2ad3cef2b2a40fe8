"""Log-probs and entropies straight from hidden states and the output layer, a chunk of tokens at a time.

The logits [N, V] of a micro-batch never exist: forward, a chunk of them is made, reduced and dropped; backward, it is
made again, becomes its own gradient, and is multiplied into those of hidden states and weight (the output layer's in
fp32). On a GPU the reductions are compiled into single kernels.

Shapes: N tokens, n of them in a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Told = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # ids, log-sum-exps, entropies, gradients of both results
CHUNK = {"compiled": 2**29, "cuda": 2**27, "cpu": 2**22}  # logits at a time


@dataclass(frozen=True, slots=True)
class OutputLayer:
    """From hidden states to logits: weight [V, H], bias [V], `scale` (Cohere, Granite), `cap` tanh(x / cap) (Gemma)."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float = 0.0  # 0: none

    @classmethod
    def of(cls, model: PreTrainedModel) -> OutputLayer:
        """A causal LM's, as its configuration describes it."""
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        told = {
            name: getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
        }
        scale = (told["logit_scale"] or 1.0) / (told["logits_scaling"] or 1.0)
        cap = told["final_logit_softcapping"] or 0.0
        return cls(head.weight, getattr(head, "bias", None), scale, cap)  # type: ignore[union-attr, arg-type]


def logprobs_and_entropy(
    hidden_NH: Tensor, layer: OutputLayer, ids_N: Tensor, temperature: float, entropy_gradient: bool, compiled: bool
) -> tuple[Tensor, Tensor]:
    """log pi(id) [N] under softmax(logits / temperature) and its entropy [N] in nats, fp32; the latter with a gradient
    if asked for."""
    settings = layer.scale / temperature, layer.cap, entropy_gradient, compiled
    return _OutputLayer.apply(hidden_NH, layer.weight, layer.bias, ids_N, settings)


class _OutputLayer(torch.autograd.Function):
    """z = scale cap tanh(x / cap), x = h W' + b; the gradients are those of losses.py."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, ids_N: Tensor, settings: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        scale, cap, entropy_gradient, compiled = settings
        logprobs_N, total_N, entropy_N = (hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32) for _ in range(3))
        reduce = _with(_reduced, scale, cap, compiled)
        for part in _chunks(hidden_NH, len(weight), compiled):
            logits_nV = torch.nn.functional.linear(hidden_NH[part], weight, bias)
            logprobs_N[part], total_N[part], entropy_N[part] = reduce(logits_nV, ids_N[part])
        ctx.save_for_backward(hidden_NH, weight, bias, ids_N, total_N, entropy_N)
        ctx.settings = settings
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight, bias, ids_N, total_N, entropy_N = ctx.saved_tensors
        scale, cap, entropy_gradient, compiled = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        differentiate = _with(_gradient, scale, cap, compiled)
        of_hidden_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for part in _chunks(hidden_NH, len(weight), compiled):
            logits_nV = torch.nn.functional.linear(hidden_NH[part], weight, bias)
            of_entropy_n = gradients[1][part] if entropy_gradient else None
            told = ids_N[part], total_N[part], entropy_N[part], gradients[0][part], of_entropy_n
            gradient_nV = differentiate(logits_nV, told)
            if of_hidden_NH is not None:
                of_hidden_NH[part] = gradient_nV @ weight
            if of_weight is not None:
                of_weight += _in_fp32(gradient_nV, hidden_NH[part])
            if of_bias is not None:
                of_bias += gradient_nV.sum(dim=0, dtype=torch.float32)
        return of_hidden_NH, _as(of_weight, weight), _as(of_bias, bias), None, None


def _reduced(logits_nV: Tensor, ids_n: Tensor, scale: float, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, log-sum-exps and entropies [n]."""
    z_nV = _scaled(logits_nV.float(), scale, cap)
    total_n = z_nV.logsumexp(dim=1)
    p_nV = (z_nV - total_n[:, None]).exp()
    mean_n = torch.where(p_nV == 0, 0.0, p_nV * z_nV).sum(dim=1)  # 0 log 0 is 0
    return z_nV.gather(1, ids_n[:, None])[:, 0] - total_n, total_n, total_n - mean_n


def _gradient(logits_nV: Tensor, told: Told, scale: float, cap: float) -> Tensor:
    """The gradient of the logits [n, V], in their dtype."""
    ids_n, total_n, entropy_n, of_logprobs_n, of_entropy_n = told
    x_nV = logits_nV.float()
    z_nV = _scaled(x_nV, scale, cap)
    log_p_nV = z_nV - total_n[:, None]
    p_nV = log_p_nV.exp()
    chosen_nV = torch.arange(logits_nV.shape[1], device=logits_nV.device) == ids_n[:, None]
    gradient_nV = torch.where(chosen_nV, of_logprobs_n[:, None], 0.0) - of_logprobs_n[:, None] * p_nV
    if of_entropy_n is not None:
        surprise_nV = torch.where(p_nV == 0, 0.0, log_p_nV + entropy_n[:, None])
        gradient_nV = gradient_nV - of_entropy_n[:, None] * p_nV * surprise_nV
    gradient_nV = gradient_nV * scale
    if cap:
        gradient_nV = gradient_nV * (1 - (x_nV / cap).tanh().square())
    return gradient_nV.to(logits_nV.dtype)


def _scaled(x_nV: Tensor, scale: float, cap: float) -> Tensor:
    return (cap * (x_nV / cap).tanh() if cap else x_nV) * scale


def _in_fp32(gradient_nV: Tensor, hidden_nH: Tensor) -> Tensor:
    """gradient' hidden [V, H] in fp32."""
    if gradient_nV.is_cuda and gradient_nV.dtype != torch.float32:
        return torch.mm(gradient_nV.T, hidden_nH, out_dtype=torch.float32)
    return (gradient_nV.T @ hidden_nH).float()


def _as(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)


def _chunks(hidden_NH: Tensor, vocabulary: int, compiled: bool) -> list[slice]:
    size = max(1, CHUNK["compiled" if compiled else hidden_NH.device.type] // vocabulary)
    return [slice(start, start + size) for start in range(0, len(hidden_NH), size)]


@functools.cache
def _with(function: Callable[..., Any], scale: float, cap: float, compiled: bool) -> Callable[..., Any]:
    """The function with these constants; compiled for full chunks, and for any number of tokens."""
    bound = functools.partial(function, scale=scale, cap=cap)
    return torch.compile(bound) if compiled else bound
