"""Where a model computes, in which dtype, and by which attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf.config import Device, ModelConfig

if TYPE_CHECKING:
    import torch


def resolve_device(device: Device) -> torch.device:
    """The device to use; ValueError if a GPU was asked for and there is none."""
    import torch

    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        raise ValueError(
            "model.device=cuda, and torch sees no CUDA device: choose model.device=cpu or model.device=auto"
        )
    return torch.device("cuda" if available and device is not Device.cpu else "cpu")


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model computes: a GPU also if the shards of its weights are in the host's memory."""
    import torch

    parameter: Any = next(model.parameters())
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or mesh.device_type == parameter.device.type:
        return parameter.device  # type: ignore[no-any-return]
    return torch.device(mesh.device_type, torch.cuda.current_device())


def check_attention(config: ModelConfig) -> None:
    """ValueError where transformers' FlashAttention is asked for, and its package is not there."""
    from transformers.utils import is_flash_attn_2_available

    if config.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError(
            "model.attention=flash_attention_2 needs a GPU and the package flash-attn: install it, or set "
            "model.attention=packed (torch's own FlashAttention) or sdpa"
        )


def computing(config: ModelConfig) -> dict[str, Any]:
    """Dtype and attention, as transformers takes them."""
    import torch

    return {"dtype": getattr(torch, config.dtype.value), "attn_implementation": config.implementation}
