"""What the estimate of memory must know of a policy, counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlhf.config import LoraConfig
from rlhf.learning.compiled_layers import decoder_layers
from rlhf.models.adapter import add_adapter, sent_weights
from rlhf.preflight.memory_estimate import Count, Sizes
from rlhf.rewards.model import ModelReward
from transfer.agreement.manifest import Manifest
from transfer.memory.regions import slot_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sizes_of(policy: PreTrainedModel, lora: LoraConfig, dtype: torch.dtype, rewards: Sequence[ModelReward]) -> Sizes:
    """The policy's sizes as they will be with an adapter, and those of reward models; updates travel in `dtype`."""
    learning = _shell(policy, lora) if lora.rank else policy
    sent = {n: t.to(dtype) if lora.rank else t for n, t in sent_weights(learning).items()}
    manifest = Manifest.planned(sent) if lora.rank else Manifest.of(sent, dtype)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(policy)]
    return Sizes(
        policy=count(learning.parameters()),
        learning=count(p for p in learning.parameters() if p.requires_grad),
        backbone=count(policy.base_model.parameters()),
        layers=sum(layers),
        largest=max(layers, default=0),
        hidden=policy.config.get_text_config().hidden_size,
        slot=slot_bytes(manifest),
        loaded_rewards=sum(count(reward.model.parameters()).nbytes for reward in rewards),
    )


def count(parameters: Iterable[torch.Tensor]) -> Count:
    """Elements and tensors; modules name tied ones once."""
    held = list(parameters)
    return Count(sum(p.numel() for p in held), len(held), held[0].element_size())


def _shell(policy: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    """The policy with its adapter, without memory."""
    with torch.device("meta"):
        shell: Any = type(policy)(policy.config)
        shell.to(policy.dtype)
        shell.tie_weights()
        add_adapter(shell, lora.rank, lora.alpha, lora.target)
    return shell
