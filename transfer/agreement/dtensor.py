"""Torch's DTensors, of which every rank holds a part: told from whole tensors without importing torch.distributed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OF_A_TRAINER = "give make_transfer the ranks, or send the whole tensors of transfer.full_weights"


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a part of a tensor whose other parts other ranks hold."""
    return _is_dtensor(type(tensor))


def any_dtensor(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether one of them is; quick also for thousands."""
    return any(map(_is_dtensor, set(map(type, tensors))))


def local_part(tensor: Any) -> Any:
    """What this rank holds of a DTensor; a whole tensor itself. Without gradients torch takes no note of it."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def full(tensor: Any) -> Any:
    """All of a DTensor, gathered by all ranks where they compute, on a GPU; a whole tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    device = tensor.device_mesh.device_type
    return (tensor if tensor.device.type == device else tensor.to(device)).full_tensor()


def holder_of(tensor: Any) -> tuple[int, int]:
    """Which holder of a DTensor's rows this rank is, and of how many: along the last dimension of its mesh."""
    mesh = tensor.device_mesh
    return mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)


def refuse_dtensors(weights: Mapping[str, torch.Tensor], instead: str = OF_A_TRAINER) -> None:
    """ValueError, with a name, if one of them is: what one rank alone reads of it is wrong without a word, or hangs."""
    if any_dtensor(weights.values()):
        name = next(name for name, tensor in weights.items() if is_dtensor(tensor))
        raise ValueError(f"{name} is a DTensor, of which each rank holds a part: {instead}")


def _is_dtensor(kind: type) -> bool:
    return hasattr(kind, "to_local")
