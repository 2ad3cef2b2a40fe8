"""How a broadcast divides the weights: into buckets of bounded size, and a bucket into what each rank holds of it.

Both sides know it by the manifest and a bucket's size alone, so that nobody has to say it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from transfer.agreement.manifest import Entry, Manifest, round_up
from transfer.agreement.shards import rows_of
from transfer.backends.hold import Hold

PADDING = 16  # bytes: every element of a share is aligned, of whatever dtype


class Piece(NamedTuple):
    """From which to which of a tensor's own bytes, and where they lie in what is sent."""

    entry: Entry
    first: int
    last: int
    at: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """The bytes of the manifest from `start` to `end`, and of each tensor in them."""

    start: int
    end: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Share:
    """What rank `rank` of the trainer sends of the bucket with the number `bucket`: its rows, behind one another."""

    bucket: int
    rank: int
    nbytes: int
    pieces: tuple[Piece, ...]


def buckets_of(manifest: Manifest, size: int) -> list[Bucket]:
    """All bytes of the manifest in buckets of `size` bytes, a multiple of ALIGNMENT; no element is divided."""
    found = []
    entries = deque(entry for entry in manifest.entries if entry.nbytes)
    for start in range(0, manifest.nbytes, size):
        end, pieces = min(start + size, manifest.nbytes), []
        while entries and entries[0].offset < end:
            entry = entries[0]
            first, last = max(0, start - entry.offset), min(entry.nbytes, end - entry.offset)
            pieces.append(Piece(entry, first, last, entry.offset + first - start))
            if entry.offset + entry.nbytes > end:
                break
            entries.popleft()
        found.append(Bucket(start, end, tuple(pieces)))
    return found


def shares_of(manifest: Manifest, size: int, ranks: int, whole: Collection[str]) -> list[Share]:
    """The same bytes bucket by bucket, and in a bucket rank by rank; entries named in `whole` are the first rank's."""
    found = []
    for number, bucket in enumerate(buckets_of(manifest, size)):
        held: dict[int, list[Piece]] = {}
        ends: dict[int, int] = {}
        for entry, first, last, _ in bucket.pieces:
            for rank, begin, end in _of_ranks(entry, first, last, 1 if entry.name in whole else ranks):
                at = round_up(ends.get(rank, 0), PADDING)
                held.setdefault(rank, []).append(Piece(entry, begin, end, at))
                ends[rank] = at + end - begin
        found += [Share(number, rank, ends[rank], tuple(held[rank])) for rank in sorted(held)]
    return found


def begin_in(entry: Entry, ranks: int, rank: int) -> int:
    """Where the rows of a rank begin in a tensor that is sharded, bytes."""
    return rows_of(entry.shape[0], ranks, rank)[0] * (entry.nbytes // entry.shape[0])


def most_bytes(shares: Sequence[Share]) -> int:
    """Of one share."""
    return max((share.nbytes for share in shares), default=0)


def _of_ranks(entry: Entry, first: int, last: int, ranks: int) -> list[tuple[int, int, int]]:
    """Which ranks hold these bytes of a tensor: each with the first and the end of what it has of them."""
    if ranks == 1 or not entry.shape:
        return [(0, first, last)]
    most = begin_in(entry, ranks, 1)
    return [
        (rank, max(first, rank * most), min(last, (rank + 1) * most))
        for rank in range(first // most, (last - 1) // most + 1)
    ]


class Packer:
    """Copies pieces of `weights`, and casts them, while a hold lasts; one after the other, as they lie.

    `begin`: where in a whole tensor that begins which is held here, bytes.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], hold: Hold, begin: Callable[[Entry], int] = lambda entry: 0
    ) -> None:
        self._weights, self._hold, self._begin = weights, hold, begin
        self._flat: dict[str, torch.Tensor] = {}  # the tensor that the next pieces go on with

    @torch.no_grad()
    def pack(self, pieces: Sequence[Piece], packed: torch.Tensor) -> None:
        """Into `packed`, uint8; ConnectionAbortedError once the hold has ended."""
        targets, sources = [], []
        for entry, first, last, at in pieces:
            if entry.name not in self._flat:
                self._flat.clear()
                with self._hold.reading():  # a tensor that is not contiguous is copied
                    self._flat[entry.name] = self._weights[entry.name].detach().reshape(-1)
            dtype, begin = entry.torch_dtype, self._begin(entry)
            targets.append(packed[at : at + last - first].view(dtype))
            sources.append(self._flat[entry.name][(first - begin) // dtype.itemsize : (last - begin) // dtype.itemsize])
        with self._hold.reading():
            torch._foreach_copy_(targets, sources)


def unpack(share: Share, given: torch.Tensor, block: torch.Tensor) -> None:
    """Put what came of a share, uint8, where it lies in a block that is laid out by the manifest."""
    targets = [block[e.offset + first : e.offset + last] for e, first, last, _ in share.pieces]
    torch._foreach_copy_(targets, [given[at : at + last - first] for _, first, last, at in share.pieces])
