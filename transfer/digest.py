"""A digest of the weights' bytes, computed where they lie: 128 bits, fast, and no protection against a forger.

    xxh3:<hex>   on the host: XXH3 (xxhash.com, 128 bits) of all tensors' bytes in the manifest's order, without padding
    sums:<hex>   on a GPU: two sums modulo 2**64 over the 8-byte words of a slot with these tensors, little-endian, zero
                 in gaps: word w at index i adds w * (i * GOLDEN | 1) to the first, (w ^ w >> 29) * (i * ODD | 1) to the
                 second, so that any change of one word changes both

Who compares takes the kind that the other side took.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from transfer.manifest import ALIGNMENT, round_up

XXH3, SUMS = "xxh3:", "sums:"
PIECE = 2**24  # bytes
GOLDEN = -7046029254386353131  # 2**64 / phi as a signed integer
ODD = -4417276706812531889  # XXH64's second prime as a signed integer
LOW = 2**35 - 1  # what a word has left after >> 29, without its sign


def digest_of(tensors: Iterable[torch.Tensor], like: str | None = None) -> str:
    """The digest of these tensors' bytes, one after the other; of the kind of `like`, if that is given."""
    tensors = list(tensors)
    on_gpu = any(tensor.is_cuda for tensor in tensors) if like is None else like.startswith(SUMS)
    if on_gpu:
        return _sums_on_gpu(tensors) or _sums(tensors)
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


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in order as uint8 [nbytes]; a view where they lie without gaps."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def sums_digest(first: int, second: int) -> str:
    """The digest with these two sums."""
    return f"{SUMS}{first % 2**64:016x}{second % 2**64:016x}"


def offsets_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Where each tensor begins in a slot, in the manifest's order: aligned to ALIGNMENT bytes."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(round_up(end, ALIGNMENT))
        end = offsets[-1] + tensor.nbytes
    return offsets


def _sums_on_gpu(tensors: list[torch.Tensor]) -> str | None:
    """In one pass of one kernel; None where not all are on a GPU for which it can be compiled."""
    from transfer.one_pass import OnePass, available

    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or not available(device := devices.pop()):
        return None
    return OnePass([tensor.detach().contiguous() for tensor in tensors], None, device).digest()


@torch.no_grad()
def _sums(tensors: list[torch.Tensor]) -> str:
    """The sums by torch's own operations, a piece at a time; one_pass.py is many times faster."""
    first = second = 0
    for tensor, offset in zip(tensors, offsets_of(tensors), strict=True):
        for start, piece in enumerate(as_bytes(tensor).split(PIECE)):
            words = torch.nn.functional.pad(piece, (0, -len(piece) % 8)).view(torch.int64)
            place = torch.arange(len(words), device=tensor.device) + (offset + start * PIECE) // 8
            mixed = words ^ ((words >> 29) & LOW)
            first += int((words * ((place * GOLDEN) | 1)).sum())
            second += int((mixed * ((place * ODD) | 1)).sum())
    return sums_digest(first, second)
