"""Decoder layers through torch.compile: fewer and larger kernels, for any number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

VARIANTS = 64  # of a class's compiled code: with and without gradients, by kind of layer, of each model


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that transformers repeats; none where a model does not say."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def compiled_layers(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's decoder layers are the compiled ones."""
    layers = decoder_layers(model)
    for layer in layers:
        layer.forward = partial(_compiled(type(layer).forward), layer)
    try:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is there again


@cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """One for all layers of a class: what differs between them are its inputs."""
    return torch.compile(forward, dynamic=True)
