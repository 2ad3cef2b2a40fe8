"""A model and its adapter as one plain model, whose weights are the base's with what the adapter adds to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.models.adapter import BASE, NAME, base_weights, layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def merged(policy: PreTrainedModel) -> PreTrainedModel:
    """A plain model that computes what the policy does; it shares the memory of what has no adapter."""
    weights = {name: tensor.detach() for name, tensor in base_weights(policy).items()}
    for name, delta in _deltas(policy):
        weights[name] = weights[name] + delta
    with torch.device("meta"):
        plain = type(policy)(policy.config)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = policy.generation_config
    return plain


@torch.no_grad()
def check_merge(policy: PreTrainedModel, plain: Mapping[str, torch.Size]) -> None:
    """ValueError unless the adapter can be merged into weights of these names and shapes, the policy's without it."""
    base = base_weights(policy)
    found = {name: weight.shape for name, weight in base.items()}
    faults = {name for name, _ in found.items() ^ plain.items()}
    faults |= {name for name, delta in _deltas(policy) if found.get(name) != delta.shape}
    adapted: dict[int, str] = {}  # weights that layers share, each of which has an adapter of its own
    for name in (_weight_of(path, layer) for path, layer in layers_of(policy)):
        if name in base and name != adapted.setdefault(base[name].data_ptr(), name):
            faults.add(name)
    if faults:
        raise ValueError(f"its adapter cannot be merged into {min(faults)}: leave such layers out of model.lora.target")


@torch.no_grad()
def merge_into(policy: PreTrainedModel, plain: Mapping[str, Tensor]) -> None:
    """Bring `merged(policy)`'s weights, by name, up to the adapter as it is now."""
    base = base_weights(policy)
    for name, delta in _deltas(policy):
        plain[name].copy_(base[name] + delta)


def _deltas(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the adapter adds to weights, by the names of `base_weights`: all names of a layer that is shared.

    Fused experts have several a module.
    """
    for path, layer in layers_of(model, shared=True):
        yield _weight_of(path, layer), layer.get_delta_weight(NAME)


def _weight_of(path: str, layer: Any) -> str:
    """The name of the weight that a layer of peft adapts."""
    return f"{path.replace(BASE, '')}.{getattr(layer, 'parameter_name', 'weight')}"
