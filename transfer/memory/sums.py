"""The GPU's kind of digest: two sums modulo 2**64 over the 8-byte words of a slot, which may be added up in any order.

sums:<hex>   word w at index i adds w * (i * GOLDEN | 1) to the first, (w ^ w >> 29) * (i * ODD | 1) to the second,
             little-endian, zero in gaps, so that any change of one word changes both
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from transfer.agreement.manifest import ALIGNMENT, round_up

SUMS = "sums:"
PIECE = 2**24  # bytes
GOLDEN = -7046029254386353131  # 2**64 / phi as a signed integer
ODD = -4417276706812531889  # XXH64's second prime as a signed integer
LOW = 2**35 - 1  # what a word has left after >> 29, without its sign


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


def added(digests: Iterable[str]) -> str:
    """The digest of parts that each have a place of their own in it, from the digests of the parts."""
    numbers = [digest.removeprefix(SUMS) for digest in digests]
    first, second = (sum(int(each[at : at + 16], 16) for each in numbers) for at in (0, 16))
    return sums_digest(first, second)


@torch.no_grad()
def sums_of(tensors: Sequence[torch.Tensor], offsets: Sequence[int] | None = None) -> str:
    """The sums by torch's own operations, a piece at a time; one_pass.py is many times faster.

    `offsets`: where the tensors begin, multiples of 8 bytes, if not where they do in a slot.
    """
    first = second = 0
    for tensor, offset in zip(tensors, offsets_of(tensors) if offsets is None else offsets, strict=True):
        for start, piece in enumerate(as_bytes(tensor).split(PIECE)):
            words = torch.nn.functional.pad(piece, (0, -len(piece) % 8)).view(torch.int64)
            place = torch.arange(len(words), device=tensor.device) + (offset + start * PIECE) // 8
            mixed = words ^ ((words >> 29) & LOW)
            first += int((words * ((place * GOLDEN) | 1)).sum())
            second += int((mixed * ((place * ODD) | 1)).sum())
    return sums_digest(first, second)
