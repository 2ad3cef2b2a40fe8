"""A reward of your own: reward=function reward.function=examples.reward_functions:brevity"""

from __future__ import annotations

from typing import Any

LONG = 60  # characters


def brevity(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
    """1 for the shortest answer, down to 0 at LONG characters; 0 for none at all, lest silence win."""
    return [max(0.0, 1.0 - len(text) / LONG) if text.strip() else 0.0 for text in completions]
