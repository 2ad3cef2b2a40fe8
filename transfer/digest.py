"""A digest of the weights' bytes, computed where they lie: 128 bits, fast, and no protection against a forger.

    xxh3:<hex>   on the host: XXH3 (xxhash.com, 128 bits) of all tensors' bytes in the manifest's order, without padding
    sums:<hex>   on a GPU: two sums modulo 2**64 over the 8-byte words of the same bytes, each word multiplied by an odd
                 number that depends on its place, so that any change of one word changes both

Who compares takes the kind that the other side took.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch

XXH3, SUMS = "xxh3:", "sums:"
PIECE = 2**24  # bytes
GOLDEN = -7046029254386353131  # 2**64 / phi as a signed integer
ODD = -4417276706812531889  # XXH64's second prime as a signed integer
PRIME = 2**61 - 1


def digest_of(tensors: Iterable[torch.Tensor], like: str | None = None) -> str:
    """The digest of these tensors' bytes, one after the other; of the kind of `like`, if that is given."""
    tensors = list(tensors)
    on_gpu = any(tensor.is_cuda for tensor in tensors) if like is None else like.startswith(SUMS)
    if on_gpu:
        return SUMS + _sums(tensors)
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


@torch.no_grad()
def _sums(tensors: list[torch.Tensor]) -> str:
    """Sums over pieces that are small enough for a GPU's cache, then a polynomial of the pieces' sums."""
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), torch.device("cpu"))
    first, second = _factors(device)
    sums = []
    for piece in _pieces([as_bytes(tensor.to(device)) for tensor in tensors]):
        words = piece.view(torch.int64)
        mixed = words ^ (words >> 29)  # so that highest bits, a float's sign, do not cancel each other
        sums += [(words * first[: len(words)]).sum(), (mixed * second[: len(words)]).sum()]
    values = torch.stack(sums).tolist() if sums else []
    digest = [len(values), len(values)]
    for index, value in enumerate(values):
        digest[index % 2] = (digest[index % 2] * PRIME + value) % 2**64
    return f"{digest[0]:016x}{digest[1]:016x}"


def _pieces(streams: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The bytes of all, one after the other, as new tensors of PIECE bytes; the last is filled with zeros to words."""
    waiting: list[torch.Tensor] = []
    missing = PIECE
    for stream in streams:
        while len(stream) >= missing:
            yield torch.cat([*waiting, stream[:missing]])
            stream, waiting, missing = stream[missing:], [], PIECE
        waiting.append(stream)
        missing -= len(stream)
    if missing < PIECE:
        yield torch.cat([*waiting, torch.zeros(missing % 8, dtype=torch.uint8, device=waiting[0].device)])


@cache
def _factors(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two different odd numbers for each word of a piece."""
    place = torch.arange(1, PIECE // 8 + 1, device=device)
    return (place * GOLDEN) | 1, (place * ODD) | 1
