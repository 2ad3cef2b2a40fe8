"""Recorded copies, done again: on a GPU by the kernel in one pass, else by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transfer.backends.base import Staged
from transfer.memory.digest import digest_of
from transfer.memory.one_pass import Lying, OnePass, available
from transfer.memory.pieces import is_direct
from transfer.memory.rows import Rows
from transfer.memory.sums import SUMS
from transfer.vllm.described import Copy, Described, parts_at
from transfer.vllm.recorder import Recording


class Replay:
    """The copies that `found` holds of `described` weights, from one slot of `staged` weights, in memory of `owner`."""

    def __init__(self, found: Recording, described: Described, staged: Staged, owner: torch.device) -> None:
        self._copies = [copy for target, source in found.copies for copy in described.copies(target, source, staged)]
        self._constants = found.constants
        self._parts = [
            part for entry in described.manifest.entries for part in parts_at(staged[entry.name], entry.offset)
        ]
        device = self._copies[0].target.device if self._copies else owner
        on_gpu = device.type == "cuda" and available(device)
        fit = [on_gpu and copy.source.is_cuda and is_direct(copy.source, copy.target) for copy in self._copies]
        direct = [copy for copy, fits in zip(self._copies, fit, strict=True) if fits]
        self._others = [copy for copy, fits in zip(self._copies, fit, strict=True) if not fits]
        places = [copy.place for copy in direct]
        contiguous = all(copy.source.is_contiguous() and copy.target.is_contiguous() for copy in direct)
        whole = not self._others and contiguous and _read_once(direct, self._parts)
        self._summed = whole and all(place % 8 == 0 for place in places)  # else the kernel's sums are not the slot's
        self._targets = [copy.target for copy in direct]
        self._places = places if self._summed else None
        self._pass: OnePass | None = None
        if direct:
            sources = [copy.source for copy in direct]
            of_ranks = any(isinstance(tensor, Rows) for tensor in staged.values())
            lying = Lying.slots if of_ranks else Lying.anywhere
            self._pass = OnePass(sources, self._targets, device, lying, owner, self._places)
        self._device = device

    @property
    def plan(self) -> str:
        """How the bytes are moved, in words."""
        by_torch = f"{len(self._others)} copies by torch" if self._others else ""
        return ", ".join(filter(None, [self._pass.plan if self._pass else "", by_torch])) or "nothing"

    @torch.no_grad()
    def run(self, with_digest: bool, unchecked: bool) -> tuple[str | None, bool]:
        """Copy; the digest of the slot, if it is wanted and costs nothing, and whether the values are finite.

        `unchecked`: nobody has looked at them before, so that also those which the kernel does not see are looked at.
        """
        digest, finite = None, True
        if self._pass is not None:
            digest, finite = self._pass.run(with_digest and self._summed)
        if self._others:
            sources = [copy.source for copy in self._others]
            torch._foreach_copy_([copy.target for copy in self._others], sources)
            floats = [source for source in sources if unchecked and source.is_floating_point()]
            finite = finite and all(bool(torch.isfinite(source).all()) for source in floats)
        for target, value in self._constants:
            target.fill_(value)
        if self._others or self._constants:
            synchronize(self._device)
        return digest, finite

    def live_digest(self, like: str) -> str:
        """Of the model's bytes, as if they lay in the slot; ValueError if they are not those that lie there."""
        if self._summed and like.startswith(SUMS):
            return OnePass(self._targets, None, self._device, offsets=self._places).digest()
        if not self.holds_now():
            raise ValueError("the model does not hold what was copied into it")
        return digest_of((part for _, part, _ in self._parts), like, [place for _, _, place in self._parts])

    def holds_now(self) -> bool:
        """Whether the model holds, byte for byte, what the copies would write; constants included."""
        copies = all(torch.equal(c.target, c.source.to(c.target.device, c.target.dtype)) for c in self._copies)
        return copies and all(bool((target == value).all()) for target, value in self._constants)


def synchronize(device: torch.device) -> None:
    """Until what was queued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read_once(copies: Sequence[Copy], parts: Sequence[tuple[int, torch.Tensor, int]]) -> bool:
    """Whether these copies, all of one dtype with their targets, read every byte of the parts exactly once."""
    spans = sorted((copy.place, copy.source.nbytes) for copy in copies)
    wanted = sorted((place, part.nbytes) for _, part, place in parts if part.numel())
    return _joined(spans) == _joined(wanted) and sum(n for _, n in spans) == sum(n for _, n in wanted)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Touching stretches made one."""
    joined: list[tuple[int, int]] = []
    for start, nbytes in spans:
        if joined and start <= sum(joined[-1]):
            joined[-1] = (joined[-1][0], max(sum(joined[-1]), start + nbytes) - joined[-1][0])
        else:
            joined.append((start, nbytes))
    return joined
