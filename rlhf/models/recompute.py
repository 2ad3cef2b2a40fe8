"""Gradient checkpointing: decoder layers keep their input, and compute the rest again in the backward pass.

transformers' own turns the key/value cache off, and the learner's prompts are shared through it. Here each layer has a
cache of its own for each time it is computed: what is computed again does not find what it has written the first time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Let `recomputing` take effect on the model; ValueError if its architecture cannot."""
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"model.gradient_checkpointing: no layers to checkpoint in {type(model).__name__}: set it to false"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
    return model


def enabled(model: torch.nn.Module) -> bool:
    """Whether `enable` was called on the model, or on one that it is a copy of."""
    return any(isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing for m in model.modules())


@contextmanager
def recomputing(
    model: torch.nn.Module,
    rows: torch.Tensor | None = None,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[bool]:
    """Forward passes inside keep little, where gradients are recorded and `enable` was called; whether that is so.

    `rows`: the cache that is passed has a row a prompt, and these are the prompts of the batch's rows; each layer takes
    its keys and values itself, so that they are not kept a row, and the cache stays as it is. `within`: what a layer's
    pass needs around it, also when it is computed again.
    """
    layers = _outermost(model) if torch.is_grad_enabled() else []
    if not layers:
        yield False
        return
    before = [
        vars(layer).get("forward") for layer in layers
    ]  # a compiled one (compiled_layers.py); else the class's own
    for place, layer in enumerate(layers):
        layer.forward = partial(_forward, layer.forward, _index(layer, place), rows, within)
    try:
        yield True
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _outermost(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers to compute again, without those that are parts of others."""
    every = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    parts = {id(part) for layer in every for part in layer.modules() if part is not layer}
    return [layer for layer in every if id(layer) not in parts]


def _index(layer: torch.nn.Module, place: int) -> int:
    """The layer's place in a cache, as it says itself, or else among all layers: vision layers may come first."""
    told = (getattr(module, "layer_idx", None) for module in layer.modules())
    return next((index for index in told if isinstance(index, int)), place)


def _forward(
    forward: Callable[..., Any],
    index: int,
    rows: torch.Tensor | None,
    within: Callable[[], AbstractContextManager[None]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """One layer, of which nothing but the input is kept."""
    cache = next((each for each in [*args, *kwargs.values()] if isinstance(each, Cache)), None)
    if cache is None:
        return checkpoint(partial(_around, within, forward), *args, use_reentrant=False, **kwargs)
    before: Any = cache.layers[index]

    def again(*args: Any) -> tuple[Any, Any]:
        own, layer = copy.copy(cache), copy.copy(before)
        own.layers = [*cache.layers[:index], layer, *cache.layers[index + 1 :]]
        if rows is not None:
            layer.batch_select_indices(rows)
        there = {name: own if each is cache else each for name, each in kwargs.items()}
        return forward(*(own if each is cache else each for each in args), **there), layer

    output, after = checkpoint(again, *args, use_reentrant=False)
    if rows is None:
        cache.layers[index] = after
    return output


def _around(
    within: Callable[[], AbstractContextManager[None]], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with within():
        return forward(*args, **kwargs)
