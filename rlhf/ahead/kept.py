"""Samples with their rewards as a file of a checkpoint, and back."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rlhf.gather import Scored
from rlhf.ranks.frames import packed, unpacked
from rlhf.shell.ending import RunError
from rlhf.types import Completion, Prompt, RewardReport, Rollouts

FILE = "ahead.bin"  # of a checkpoint
T = TypeVar("T")


def written(folder: Path, told: dict[str, Any]) -> None:
    """Write what is told into a checkpoint's folder: numbers, texts, lists and columns."""
    (folder / FILE).write_bytes(packed(told))


def read(folder: Path, made_of: Callable[[Any], T]) -> T | None:
    """What `made_of` makes of what a checkpoint's folder has; None: nothing. RunError if it makes no sense."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return made_of(unpacked(path.read_bytes()))
    except (ValueError, KeyError, TypeError, IndexError, struct.error) as error:
        raise RunError(f"{path}: it has no samples as a run has them: {type(error).__name__}: {error}") from error


def told(scored: Scored, numbers: dict[int, int]) -> dict[str, Any]:
    """Samples and their rewards; of a prompt its number among the task's, by its id()."""
    rollouts, rewards = scored
    return {
        "prompts": [numbers[id(prompt)] for prompt in rollouts.prompts],
        "rows": [[c.ids, c.logprobs, c.versions, c.finish_reason, c.sampled] for c in rollouts.completions],
        "texts": rollouts.texts,
        "seeds": rollouts.seeds,
        "n": rollouts.samples_per_prompt,
        "conversations": rollouts.conversations,
        "rewards": rewards,
    }


def heard(said: Any, prompts: Sequence[Prompt]) -> Scored:
    """The inverse of `told`."""
    rollouts = Rollouts(
        [prompts[number] for number in said["prompts"]],
        [Completion(*row) for row in said["rows"]],
        said["texts"],
        said["seeds"],
        said["n"],
        said["conversations"],
    )
    return rollouts, said["rewards"]


def told_reports(reports: Sequence[RewardReport]) -> list[dict[str, Any]]:
    """What rewards have noted."""
    return [asdict(report) for report in reports]


def heard_reports(said: Any) -> list[RewardReport]:
    """The inverse of `told_reports`."""
    return [RewardReport(**each) for each in said]
