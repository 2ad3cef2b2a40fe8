"""What lies in the trainer's own memory, said by a word of host memory: workers that copy it look there afterwards.

A sequence lock with one writer. The trainer writes a version's number before anybody is told of it, and CHANGING before
it goes on, with an answer or without. A worker copies, then reads: if the word is still that version's, the weights
held still all the while. No clock is asked and nobody waits: whoever was stopped, in whatever place and for how long,
finds out when it goes on. A trainer that was killed changes nothing any more, so its last word stays true.

Beside weights on a GPU the word is on the host, too: to write and read it takes no call of CUDA. The trainer's store is
seen before a kernel that it launches afterwards, the worker's load comes after its copy has been waited for.
"""

from __future__ import annotations

from typing import Any

import torch

from transfer.memory import regions

MARK_BYTES = regions.PAGE  # at the end of a host region
CHANGING = -1  # no version lies there, or none that holds still
WENT_ON = "the trainer has gone on before they were copied: its weights may have changed meanwhile"
MASK = 2**63 - 1  # versions are unsigned 64-bit numbers, the word is signed


class Mark:
    """The word at the end of a host region; the region's owner writes it, peers read it.

    It is eight aligned bytes, which one store writes and one load reads: nobody sees half of it. It is reached without
    torch, whose calls take microseconds once their code has left the cache.
    """

    def __init__(self, region: regions.HostRegion | regions.PeerHostRegion) -> None:
        self._word: Any = region.bytes[-MARK_BYTES:][:8].view(torch.int64).numpy()

    def hold(self, version: int) -> None:
        """From now on `version` lies there."""
        self._word[0] = version & MASK

    def let_go(self) -> None:
        """From now on the weights may change: whoever copies later than this is told so."""
        self._word[0] = CHANGING

    def holds(self, version: int) -> bool:
        """Whether `version` still lies there: then what was read of it before this call is whole."""
        return int(self._word.item()) == version & MASK
