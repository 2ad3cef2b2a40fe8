"""A digest of the weights' bytes, computed where they lie: 128 bits, fast, and no protection against a forger.

    xxh3:<hex>   on the host: XXH3 (xxhash.com, 128 bits) of all tensors' bytes in the manifest's order, without padding
    sums:<hex>   on a GPU: two sums over the words of a slot with these tensors (sums.py)

Who compares takes the kind that the other side took.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from transfer.memory.one_pass import OnePass, available
from transfer.memory.sums import SUMS, as_bytes, sums_of

XXH3 = "xxh3:"


def digest_of(tensors: Iterable[torch.Tensor], like: str | None = None, places: Sequence[int] | None = None) -> str:
    """The digest of these tensors' bytes, one after the other; of the kind of `like`, if that is given.

    `places`: where each begins in what sums are taken of, if not in one slot with these tensors, bytes.
    """
    tensors = list(tensors)
    on_gpu = any(tensor.is_cuda for tensor in tensors) if like is None else like.startswith(SUMS)
    if on_gpu:
        return _sums_on_gpu(tensors, places) or sums_of(tensors, places)
    hasher = Hasher()
    for tensor in tensors:
        hasher.add(tensor.cpu())
    return hasher.digest()


class Hasher:
    """The digest on the host, a tensor at a time: best right after it was written, while it is in the cache."""

    def __init__(self) -> None:
        import xxhash

        self._state = xxhash.xxh3_128()

    def add(self, tensor: torch.Tensor) -> None:
        """Append a tensor's bytes."""
        if tensor.numel():
            self._state.update(as_bytes(tensor).numpy().data)

    def digest(self) -> str:
        """The digest so far."""
        return XXH3 + self._state.hexdigest()


def _sums_on_gpu(tensors: list[torch.Tensor], places: Sequence[int] | None) -> str | None:
    """In one pass of one kernel; None where not all are on a GPU for which it can be compiled."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or not available(device := devices.pop()):
        return None
    return OnePass([tensor.detach().contiguous() for tensor in tensors], None, device, offsets=places).digest()
