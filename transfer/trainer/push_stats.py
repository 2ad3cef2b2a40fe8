"""What one push moved and took, for logs and benchmarks; standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PushStats:
    """What one push moved and took: bytes of weights, seconds, and the messages, both ways, with all workers."""

    bytes: int = 0
    seconds: float = 0.0
    write_seconds: float = 0.0
    messages: Sequence[Mapping[str, Any]] = ()
    restarts: int = 0  # workers that were started again meanwhile

    @property
    def control_bytes(self) -> int:
        """The messages' size as JSON."""
        return sum(len(json.dumps(each, separators=(",", ":"))) for each in self.messages)

    def numbers(self) -> dict[str, float]:
        """All of it by name, for a log."""
        names = ("bytes", "seconds", "write_seconds", "control_bytes", "restarts")
        return {name: float(getattr(self, name)) for name in names}
