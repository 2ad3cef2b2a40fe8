"""Tokens that are never sampled: what an evaluation may cut off the distribution, and a training run may not."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from rlhf.config.rules import at_least, in_range

MASKS = "arXiv:2512.02556, section 3.1"  # where a trainer keeps the sampler's masks


@dataclass(frozen=True, slots=True)
class Cut:
    """Only these tokens may be sampled, of the distribution at its temperature; log-probs are of what is left of it.

    Those of at least `min_p` times the likeliest one's probability, then the `top_k` likeliest of them, then the fewest
    likeliest that have `top_p` of the probability together.
    """

    top_p: float = 1.0  # 1: all
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # 0: all

    @property
    def told(self) -> dict[str, Any]:
        """What is not as it is where nothing is cut, by name."""
        there = {each.name: (getattr(self, each.name), each.default) for each in fields(self)}
        return {name: value for name, (value, default) in there.items() if value != default}

    def __bool__(self) -> bool:
        """Whether anything is cut off."""
        return bool(self.told)

    def check(self, group: str) -> None:
        """ValueError, with the keys of a group of the configuration, unless it leaves something of a distribution."""
        in_range(f"{group}.min_p", self.min_p, 0.0, 1.0)
        at_least(f"{group}.top_k", self.top_k, 0)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{group}.top_p must be greater than 0 and at most 1 (got {self.top_p})")


WHOLE = Cut()


def refuse_in_training(cut: Cut) -> None:
    """ValueError where what is learned from would be sampled from a cut distribution."""
    for key, value in cut.told.items():
        raise ValueError(
            f"rollout.{key}={value} cuts tokens off the distribution that samples come from, and a step learns from "
            "log-probs over all tokens, whose ratios would then be wrong (it would need the sampler's own mask of each "
            f"token, {MASKS}): leave it out, or set evaluate.{key} for evaluations alone"
        )
