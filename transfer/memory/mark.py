"""What lies in the trainer's own memory, said by a word of that memory: workers that copy it look there afterwards.

A sequence lock with one writer. The trainer writes a version's number before anybody is told of it, and CHANGING before
it goes on, with an answer or without. A worker copies, then reads: if the word is still that version's, the weights
held still all the while. No clock is asked and nobody waits: whoever was stopped, in whatever place and for how long,
finds out when it goes on. A trainer that was killed changes nothing any more, so its last word stays true.
"""

from __future__ import annotations

import torch

from transfer.memory import regions

MARK_BYTES = regions.PAGE  # at the end of the region
CHANGING = -1  # no version lies there, or none that holds still
WENT_ON = "the trainer has gone on before they were copied: its weights may have changed meanwhile"
MASK = 2**63 - 1  # versions are unsigned 64-bit numbers, the word is signed


class Mark:
    """The word at the end of a region; the region's owner writes it, peers read it.

    It is eight aligned bytes, which one store writes and one load reads: nobody sees half of it. On the host it is
    reached without torch, whose calls take microseconds once their code has left the cache.
    """

    def __init__(self, region: regions.Region) -> None:
        self._word = region.bytes[-MARK_BYTES:][:8].view(torch.int64)
        self._on_host = None if self._word.is_cuda else self._word.numpy()

    def hold(self, version: int) -> None:
        """From now on `version` lies there."""
        self._write(version & MASK)

    def let_go(self) -> None:
        """From now on the weights may change: whoever copies later than this is told so."""
        self._write(CHANGING)

    def holds(self, version: int) -> bool:
        """Whether `version` still lies there: then what was read of it before this call is whole."""
        found = self._word if self._on_host is None else self._on_host
        return int(found.item()) == version & MASK

    def _write(self, value: int) -> None:
        if self._on_host is not None:
            self._on_host[0] = value
            return
        self._word.fill_(value)
        torch.cuda.synchronize(self._word.device)  # before any other stream writes weights
