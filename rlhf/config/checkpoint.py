"""When a run's state is saved, and how much of that is kept."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config.rules import at_least


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, from which `python -m rlhf.resume` goes on (docs/operations.md)."""

    every: int = 10  # steps; also before the first and after the last; 0: none at all
    keep: int = 2  # so many of the newest,
    keep_best: bool = True  # and that of the best evaluation, by gold where there is a gold score, else by the reward
    check_data: bool = True  # a resume with other rows than the run began with is refused; false: it goes on

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 1)
