"""The KL penalty's coefficient: fixed, or moved so that the KL stays near a target (arXiv:1909.08593)."""

from __future__ import annotations

import math
from dataclasses import dataclass

ERROR = 0.2  # the relative error that counts, at most


@dataclass(slots=True)
class KlController:
    """`coefficient` is the state to keep in a checkpoint; `target` None: it is fixed."""

    coefficient: float
    target: float | None = None  # nats a row
    horizon: int = 10000  # rows

    def observe(self, kl: float, rows: int) -> None:
        """Move the coefficient after a step of so many rows, whose summed KL was `kl` nats a row on average."""
        if self.target is not None and not math.isnan(kl):
            error = max(-ERROR, min(ERROR, kl / self.target - 1))
            self.coefficient *= 1 + error * rows / self.horizon
