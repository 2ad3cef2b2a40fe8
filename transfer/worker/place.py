"""What a place is where weights land: landing.py has a module's tensors, transfer/vllm those of engines and servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from transfer.agreement.manifest import Manifest
from transfer.backends.base import Staged


class Place(Protocol):
    """Where weights land: a module in this process, or one that is reached by other means."""

    manifest: Manifest  # of the weights that it holds
    parameters: set[str]  # the names of those that every one-shot update must bring
    device: torch.device

    @property
    def plan(self) -> str: ...
    def wants_block(self, slots: Sequence[Staged]) -> bool: ...
    def prepare(self, slots: Sequence[Staged], owner: torch.device, copied: bool, empty: bool) -> None: ...
    def digest(self, staged: Staged, like: str) -> str: ...
    def live_digest(self, like: str, staged: Staged) -> str: ...
    def copy(self, staged: Staged, unchecked: bool, with_digest: bool) -> str | None: ...
    def view(self, staged: Staged) -> None: ...
    def forget(self) -> None: ...
    def close(self) -> None: ...
