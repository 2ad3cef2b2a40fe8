"""Recorded copies, done again: on a GPU by the kernel in one pass, else by torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from transfer.agreement.manifest import Manifest
from transfer.memory.digest import digest_of
from transfer.memory.one_pass import OnePass, available
from transfer.memory.pieces import CASTS
from transfer.memory.sums import SUMS
from transfer.vllm.recorder import Recording


class Replay:
    """The copies that `found` holds from one slot, `staged`, laid out as `manifest` says, in memory of `owner`."""

    def __init__(
        self, found: Recording, manifest: Manifest, staged: Mapping[str, torch.Tensor], owner: torch.device
    ) -> None:
        pairs = [(target, source) for target, source in found.copies if target.numel()]
        self._found = found
        self._entries = [staged[entry.name] for entry in manifest.entries]
        device = pairs[0][0].device if pairs else owner
        on_gpu = device.type == "cuda" and available(device)
        direct = [pair for pair in pairs if on_gpu and _is_direct(*pair)]
        self._others = [pair for pair in pairs if not (on_gpu and _is_direct(*pair))]
        base = min((entry.data_ptr() for entry in self._entries if entry.numel()), default=0)
        offsets = [source.data_ptr() - base for _, source in direct]
        whole = not self._others and _read_once([source for _, source in direct], self._entries)
        self._summed = whole and all(offset % 8 == 0 for offset in offsets)  # else the kernel's sums are not the slot's
        self._targets = [target for target, _ in direct]
        self._offsets = offsets if self._summed else None
        self._pass: OnePass | None = None
        if direct:
            sources = [source for _, source in direct]
            self._pass = OnePass(sources, self._targets, device, owner=owner, offsets=self._offsets)
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
            torch._foreach_copy_([target for target, _ in self._others], [source for _, source in self._others])
            floats = [source for _, source in self._others if unchecked and source.is_floating_point()]
            finite = finite and all(bool(torch.isfinite(source).all()) for source in floats)
        for target, value in self._found.constants:
            target.fill_(value)
        if self._others or self._found.constants:
            synchronize(self._device)
        return digest, finite

    def live_digest(self, like: str) -> str:
        """Of the model's bytes, as if they lay in the slot; ValueError if they are not those that lie there."""
        if self._summed and like.startswith(SUMS):
            return OnePass(self._targets, None, self._device, offsets=self._offsets).digest()
        if not holds_now(self._found):
            raise ValueError("the model does not hold what was copied into it")
        return digest_of(self._entries, like)


def holds_now(found: Recording) -> bool:
    """Whether the model holds, byte for byte, what the copies would write; constants included."""
    copies = all(torch.equal(target, source.to(target.device, target.dtype)) for target, source in found.copies)
    return copies and all(bool((target == value).all()) for target, value in found.constants)


def synchronize(device: torch.device) -> None:
    """Until what was queued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_direct(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether the kernel can do this copy."""
    known = source.dtype == target.dtype or (source.dtype, target.dtype) in CASTS
    return known and source.is_cuda and source.is_contiguous() and target.is_contiguous()


def _read_once(sources: list[torch.Tensor], entries: list[torch.Tensor]) -> bool:
    """Whether these copies, all of one dtype with their targets, read every byte of the entries exactly once."""
    spans = sorted((each.data_ptr(), each.nbytes) for each in sources)
    wanted = sorted((each.data_ptr(), each.nbytes) for each in entries if each.numel())
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
