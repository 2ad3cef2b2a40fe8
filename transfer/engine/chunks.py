"""Weights that come as vLLM's one-shot messages: copied aside, checked against the module, live only if complete."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from transfer.agreement.manifest import Manifest
from transfer.agreement.shown import MAX_SHOWN, one_line


class Chunks:
    """What the messages of one update have brought so far, by entry name; either name of tied weights will do."""

    def __init__(self, manifest: Manifest, device: torch.device, parameters: set[str]) -> None:
        self._manifest = manifest
        self._device = device
        self._required = [e.name for e in manifest.entries if parameters.intersection(e.names)]  # buffers may stay
        self._staged: dict[str, torch.Tensor] = {}

    def stage(self, info: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Add one message's tensors; all tensors so far. ValueError if one does not fit the module."""
        from transfer.engine.ipc import IPCWeightTransferEngine

        engine = IPCWeightTransferEngine(None, None)
        engine.receive_weights(engine.parse_update_info(dict(info)), self._load)
        return self._staged

    def check_complete(self) -> None:
        """ValueError unless every parameter has come."""
        missing = [name for name in self._required if name not in self._staged]
        if missing:
            raise ValueError(f"{len(missing)} of {len(self._required)} weights are missing: {', '.join(missing[:10])}")

    def clear(self) -> None:
        """Forget the tensors; those handed out stay whole."""
        self._staged = {}

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            entry = self._manifest.by_name.get(name)
            if entry is None:
                raise ValueError(f"the module has no weight called {one_line(name, MAX_SHOWN)}")
            if (tensor.dtype, tuple(tensor.shape)) != (entry.torch_dtype, entry.shape):
                raise ValueError(
                    f"{name} must be {entry.dtype} {list(entry.shape)} (got {tensor.dtype} {list(tensor.shape)})"
                )
            self._staged[entry.name] = torch.empty(entry.shape, dtype=tensor.dtype, device=self._device).copy_(tensor)
