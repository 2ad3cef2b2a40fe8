"""What a trainer's weights must be before any worker is told of them: those agreed on, still tied, and finite."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from transfer.agreement.dtensor import local_part, refuse_dtensors
from transfer.agreement.manifest import Manifest, same_tensors
from transfer.agreement.wire import TransferError
from transfer.backends.base import Publisher, Weights
from transfer.memory.finite import not_finite

SHAPE = operator.attrgetter("shape")


class WeightChecks:
    """Holds weights to the manifest of a session; `names` are those of its first weights, as the trainer orders them.

    The publisher says what need not be looked for: values that it, or a worker, finds itself.
    """

    def __init__(self, publisher: Publisher, manifest: Manifest, names: Sequence[str]) -> None:
        self.manifest = manifest
        self._publisher = publisher
        self._names = list(names)
        self._shapes = {entry.name: torch.Size(entry.shape) for entry in manifest.entries}
        self._tied = [entry for entry in manifest.entries if entry.aliases]

    def check(self, weights: Weights, version: int) -> None:
        """TransferError unless the tensors are those agreed on, and finite also in the dtype that travels."""
        known = list(weights) == self._names and same_tensors(weights.values(), self._publisher.given)
        if not known:
            self._check_form(weights, version)
        for entry in self._tied:
            places = {local_part(weights[name]).data_ptr() for name in entry.names}
            if len(places) > 1:
                raise TransferError(f"version {version}: {entry.name} is no longer tied to {entry.aliases}")
        bad = None if self._publisher.finds_nonfinite else not_finite(weights, self.manifest)
        if bad is not None:
            raise nonfinite(bad, version)

    def _check_form(self, weights: Weights, version: int) -> None:
        if not self._publisher.takes_shards:
            refuse_dtensors(weights)
        if weights.keys() != self.manifest.by_name.keys():
            changed = sorted(weights.keys() ^ self.manifest.by_name.keys())
            raise TransferError(f"version {version}: other names than agreed on: {', '.join(changed[:10])}")
        shapes = map(SHAPE, map(weights.__getitem__, self._shapes))  # never all at once: 19,000 new objects wake the gc
        if not all(map(operator.eq, shapes, self._shapes.values())):
            other = next(entry for entry in self.manifest.entries if weights[entry.name].shape != entry.shape)
            raise TransferError(f"version {version}: {other.name} is not the {list(other.shape)} agreed on")


def nonfinite(tensor: str | None, version: int) -> TransferError:
    """The error that names the first tensor with such values."""
    return TransferError(f"version {version}: {tensor} has values that are not finite; nothing was sent")
