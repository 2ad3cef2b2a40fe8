"""Parts of your own, one of each kind: plugins=[examples.own_parts] task=count reward=short ... (README.md has a line)

What is heavy is imported inside of the makers, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.config import EnvironmentConfig, LoggerConfig, OptimConfig, RewardConfig, TaskConfig
from rlhf.config.rules import at_least, in_range
from rlhf.plugins import advantage, environment, logger, loss, optimizer, reward, task

if TYPE_CHECKING:
    from torch import Tensor


# --- a task: prompts, a demonstration each, and what an answer is worth -----------------------------------------------


@dataclass(slots=True, kw_only=True)
class CountConfig(TaskConfig):
    """`aaa=` -> `3`."""

    held_out: int = 8
    most: int = 9  # letters of a prompt

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        in_range("task.most", self.most, 1, 9)


@task("count", CountConfig)
def count(config, seed):
    """Rows with a question, the columns that rewards get, and a demonstration; the same for the same seed."""
    import random

    from rlhf.tasks import RawTask, Row

    letters = [letter * number for letter in "abcdefgh" for number in range(1, config.most + 1)]
    random.Random(seed).shuffle(letters)
    rows = [Row(f"{text}=", {"answer": str(len(text))}, demonstration=str(len(text))) for text in letters]
    return RawTask(rows[config.held_out :], rows[: config.held_out], gold=right)


def right(columns, answer):
    """The gold score: 1 for the right number, else 0."""
    return float(answer.strip() == columns["answer"])


# --- an environment: what answers the policy --------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class TryAgainConfig(EnvironmentConfig):
    """Says `?` until the answer is right."""

    turns: int = 2


@environment("try_again", TryAgainConfig)
def try_again(config):
    """A reply to the answers so far, or None where it is over; the longest reply, and its characters."""
    from rlhf.tasks import Replies

    def reply(columns, answers):
        return None if right(columns, answers[-1]) else "?"

    return Replies(config.turns, reply, longest="?", characters="?")


# --- a reward ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class ShortConfig(RewardConfig):
    """The gold score, for answers that are short enough."""

    longest: int = 2  # characters

    def __post_init__(self) -> None:
        RewardConfig.__post_init__(self)
        at_least("reward.longest", self.longest, 1)


@reward("short", ShortConfig)
def short(config, given):
    """What gives each answer a number, or None to leave it out."""

    def score(prompts, answers):
        pairs = zip(prompts, answers, strict=True)
        return [given.task.score(prompt, text) if len(text) <= config.longest else 0.0 for prompt, text in pairs]

    return score


# --- parts of an algorithm: pure functions ----------------------------------------------------------------------------


@loss("asymmetric")
def asymmetric(algo, logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor):
    """-r A, with the ratio r cut where it is high: the loss of each token, and log r."""
    from rlhf.learning.losses import log_ratio

    delta_BT = log_ratio(logprobs_BT, old_BT)
    return -delta_BT.exp().clamp(max=1 + algo.clip_high) * advantages_BT, delta_BT


@advantage("best_half")
def best_half(algo, rewards_Pn: Tensor) -> Tensor:
    """+1 for a group's rewards above its median, -1 for those below."""
    return (rewards_Pn - rewards_Pn.nanmedian(dim=1, keepdim=True).values).sign()


# --- an optimiser, and a logger ---------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class SgdConfig(OptimConfig):
    """Stochastic gradient descent."""

    momentum: float = 0.9

    def __post_init__(self) -> None:
        OptimConfig.__post_init__(self)
        in_range("optim.momentum", self.momentum, 0.0, 1.0)


@optimizer("sgd", SgdConfig)
def sgd(config, named, lr):
    """Over the named parameters, as they are: checkpoints know its state by their names."""
    import torch

    return torch.optim.SGD(named, lr=lr, momentum=config.momentum)


@dataclass(slots=True, kw_only=True)
class BestConfig(LoggerConfig):
    """`best.txt` in the run's folder: the highest value of a metric."""

    metric: str = "eval/gold"


@logger("best", BestConfig, writes={"best.txt": "the highest value of a metric"})
class Best:
    """A class is a maker, too."""

    def __init__(self, config, given) -> None:
        self.metric, self.path, self.best = config.metric, given.folder / "best.txt", float("-inf")

    def log(self, step, metrics) -> None:
        """A step's or an evaluation's numbers."""
        if metrics.get(self.metric, self.best) > self.best:
            self.best = metrics[self.metric]
            self.path.write_text(f"{self.best} in step {step}\n", encoding="utf-8")

    def close(self) -> None:
        """Nothing is open."""
