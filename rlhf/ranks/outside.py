"""What the first rank hears from outside, for all ranks: samples with their rewards, measures, and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rlhf.ranks.frames import heard_row, told_episode, told_row
from rlhf.ranks.ranks import Ranks
from rlhf.types import Prompt, Rollouts, Sampler, Told

Scored = tuple[Rollouts, list[float | None]]


def told(rollouts: Rollouts) -> dict[str, Any]:
    """Samples as JSON and columns; of a prompt its ids alone."""
    return {
        "prompts": [list(prompt.ids) for prompt in rollouts.prompts],
        "rows": [told_row(row) for row in rollouts.completions],
        "texts": rollouts.texts,
        "seeds": rollouts.seeds,
        "n": rollouts.samples_per_prompt,
        "episodes": [told_episode(each) for each in rollouts.episodes],
    }


def heard(said: Any) -> Rollouts:
    """The inverse of `told`."""
    return Rollouts(
        [Prompt("", tuple(ids)) for ids in said["prompts"]],
        [heard_row(row) for row in said["rows"]],
        said["texts"],
        said["seeds"],
        said["n"],
        [Told(*each) for each in said["episodes"]],
    )


@dataclass(slots=True)
class ToldSampler:
    """A `rlhf.types.Sampler` of all ranks: the first one's, whose samples all get."""

    ranks: Ranks
    sampler: Sampler  # asked in the first rank alone

    def sample(self, prompts: Sequence[Prompt], *, n: int, temperature: float, seed: int) -> Rollouts:
        """Draw n answers a prompt."""
        draw = partial(self.sampler.sample, prompts, n=n, temperature=temperature, seed=seed)
        return self.ranks.heard(draw, told, heard)


class Gathers(Protocol):
    """What draws a step's samples, and rewards them."""

    def __call__(self, train: Sequence[Prompt], rows: Sequence[int], step: int) -> Scored: ...

    def settle(self) -> None:
        """Wait until the weights that are live may be replaced."""

    def release(self) -> None:
        """What the step has learned from is over, and its weights are live."""

    def write(self, folder: Path, step: int) -> None:
        """Into a checkpoint after `step`: what is there of the next."""


@dataclass(slots=True)
class ToldGather:
    """The first rank's samples of a step and their rewards, for all ranks."""

    ranks: Ranks
    gather: Gathers | None  # in the first rank

    def __call__(self, train: Sequence[Prompt], rows: Sequence[int], step: int) -> Scored:
        """The samples of the step's prompts, `train[rows]`, and a reward for each."""
        return self.ranks.heard(
            lambda: self._gathers(train, rows, step),
            lambda scored: [told(scored[0]), scored[1]],
            lambda said: (heard(said[0]), said[1]),
        )

    def settle(self) -> None:
        """Wait, in the first rank, until the weights that are live may be replaced."""
        if self.ranks.first:
            self._gathers.settle()

    def release(self) -> None:
        """Tell the first rank's that the step is over."""
        if self.ranks.first:
            self._gathers.release()

    def write(self, folder: Path, step: int) -> None:
        """Into a checkpoint after `step`, by the first rank: what is there of the next."""
        self._gathers.write(folder, step)

    @property
    def _gathers(self) -> Gathers:
        assert self.gather is not None, "only the first rank samples and scores"
        return self.gather
