"""The data set's other fields, as rewards get them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.tasks.raw import Row
from rlhf.types import Prompt


def names(prompts: Sequence[Prompt | Row]) -> list[str]:
    """The columns that any of these prompts, or rows, has, sorted."""
    return sorted({key for prompt in prompts for key in prompt.columns})


def columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Each column's values, [prompts]; None where a prompt has none."""
    return {key: [prompt.columns.get(key) for prompt in prompts] for key in names(prompts)}
