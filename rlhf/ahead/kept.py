"""Samples with their rewards as a file of a checkpoint, and back."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from rlhf.ahead.slots import Slot, Slots
from rlhf.gather import Scored, groups_of, joined
from rlhf.ranks.frames import heard_row, packed, told_episode, told_row, unpacked
from rlhf.shell.ending import RunError
from rlhf.types import VERSIONS, Prompt, RewardReport, Rollouts, Told, column

FILE = "ahead.bin"  # of a checkpoint
QUEUE, STEP = "held", "rows"  # what a queue tells, and what a step's samples
T = TypeVar("T")


def written(folder: Path, told: dict[str, Any]) -> None:
    """Write what is told into a checkpoint's folder: numbers, texts, lists and columns."""
    (folder / FILE).write_bytes(packed(told))


def read(folder: Path, queue: bool, made_of: Callable[[Any], T]) -> T | None:
    """What `made_of` makes of what a checkpoint's folder has; None: nothing. RunError if it makes no sense.

    Nothing, too, where the run has saved a `queue` and is to have none now, or the other way round: it draws anew.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        said = unpacked(path.read_bytes())
        return None if (STEP if queue else QUEUE) in said else made_of(said)
    except (ValueError, KeyError, TypeError, IndexError, struct.error) as error:
        raise RunError(f"{path}: it has no samples as a run has them: {type(error).__name__}: {error}") from error


def told(scored: Scored, numbers: dict[int, int]) -> dict[str, Any]:
    """Samples and their rewards; of a prompt its number among the task's, by its id()."""
    rollouts, rewards = scored
    return {
        "prompts": [numbers[id(prompt)] for prompt in rollouts.prompts],
        STEP: [told_row(row) for row in rollouts.completions],
        "texts": rollouts.texts,
        "seeds": rollouts.seeds,
        "n": rollouts.samples_per_prompt,
        "episodes": [told_episode(each) for each in rollouts.episodes],
        "rewards": rewards,
    }


def heard(said: Any, prompts: Sequence[Prompt], later: int = 0) -> Scored:
    """The inverse of `told`; versions have numbers that are `later` now."""
    completions = [heard_row(row) for row in said[STEP]]
    if later:
        completions = [
            replace(each, versions=column(VERSIONS, [number + later for number in each.versions]))
            for each in completions
        ]
    rollouts = Rollouts(
        [prompts[number] for number in said["prompts"]],
        completions,
        said["texts"],
        said["seeds"],
        said["n"],
        [Told(*each) for each in said["episodes"]],
    )
    return rollouts, said["rewards"]


def told_reports(reports: Sequence[RewardReport]) -> list[dict[str, Any]]:
    """What rewards have noted."""
    return [asdict(report) for report in reports]


def heard_reports(said: Any) -> list[RewardReport]:
    """The inverse of `told_reports`."""
    return [RewardReport(**each) for each in said]


def told_slots(slots: Slots, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Where the stream is, and the groups that are not learned from yet; of those that are not whole, that they are."""
    numbers = {id(prompt): number for number, prompt in enumerate(prompts)}
    whole = [(slot.index, slot.group, slot.report) for slot in slots.held if slot.group is not None]
    return {
        "next": slots.next,
        "learned": slots.learned,
        "left_out": slots.left_out,
        QUEUE: [slot.index for slot in slots.held],
        "whole": [index for index, _, _ in whole],
        "groups": told(joined([group for _, group, _ in whole]), numbers) if whole else None,
        "reports": [None if report is None else asdict(report) for _, _, report in whole],
    }


def heard_slots(said: Any, slots: Slots, prompts: Sequence[Prompt], later: int = 0) -> None:
    """Bring `slots`, which are new, to where they were; what was being drawn is drawn anew. `later`: as in `heard`."""
    slots.next, slots.learned, slots.left_out = said["next"], said["learned"], said["left_out"]
    slots.held = [Slot(index) for index in said[QUEUE]]
    by_index = {slot.index: slot for slot in slots.held}
    groups = groups_of(heard(said["groups"], prompts, later)) if said["whole"] else []
    for index, group, report in zip(said["whole"], groups, said["reports"], strict=True):
        by_index[index].group, by_index[index].asked = group, True
        by_index[index].report = None if report is None else RewardReport(**report)
