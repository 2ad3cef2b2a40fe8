"""The cache of a transformers causal LM: by which name its forward takes it, and where the output has it.

transformers calls it `cache` since 5.24, and earlier `past_key_values` or `cache_params`. A name that a model does not
have is no error: `**kwargs` takes it, and the model computes as if nothing came before.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import DynamicCache

NAMES = ("cache", "past_key_values", "cache_params")  # the newest first


def parameters_of(model: Any) -> frozenset[str]:
    """The names that the model's forward has, those aside that it takes as `**kwargs`."""
    named = inspect.signature(model.forward).parameters.values()
    return frozenset(parameter.name for parameter in named if parameter.kind is not parameter.VAR_KEYWORD)


def cache_name(model: Any) -> str:
    """The name of the cache among the arguments of the model's forward; ValueError if it takes none."""
    known = parameters_of(model)
    for name in NAMES:
        if name in known:
            return name
    raise ValueError(f"{type(model).__name__} takes no cache: none of {', '.join(NAMES)} is an argument of its forward")


def cache_of(output: Any) -> Any:
    """The cache in a model's output; ValueError if there is none."""
    for name in NAMES:
        if (cache := getattr(output, name, None)) is not None:
            return cache
    raise ValueError(f"{type(output).__name__} has no cache: none of {', '.join(NAMES)} is in it")


def recurrent(model: Any) -> bool:
    """Whether layers of the model carry a state from token to token: padding before a row would be part of it."""
    if getattr(model, "_is_stateful", False):
        return True
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # a configuration without what transformers asks for: the model makes caches of its own kind
        return False
    return any(hasattr(layer, "conv_states") for layer in layers)
