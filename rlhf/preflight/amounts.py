"""Whether a task has enough rows of each kind that the run learns from, be they texts still or tokenised already."""

from __future__ import annotations

from rlhf.config import RunConfig, VerifierRewardConfig
from rlhf.config.algo import DpoConfig
from rlhf.types import Amounts


def check_amounts(config: RunConfig, task: Amounts) -> None:
    """Raise ValueError where the task has too few rows of a kind that the run learns from."""
    if config.sft.steps and not task.demonstrations:
        raise ValueError("this task's data have no demonstrations to warm up on: set sft.steps=0")
    prompts = len(task.train)
    if isinstance(config.algo, DpoConfig):
        _check_source_of_pairs(config, config.algo, task)
    elif config.prompts_per_step > prompts:
        raise ValueError(
            f"prompts_per_step must be at most the task's {prompts} training prompts (got {config.prompts_per_step})"
        )


def judged_by_amounts(config: RunConfig) -> bool:
    """Whether no more is to be asked of the reward: on pairs, the verifier is shown where there is a gold score."""
    return isinstance(config.algo, DpoConfig) and isinstance(config.reward, VerifierRewardConfig)


def _check_source_of_pairs(config: RunConfig, algo: DpoConfig, task: Amounts) -> None:
    """ValueError where neither the task's data nor samples can give pairs."""
    if task.preferences:
        return
    if all(task.score(prompt, "") is None for prompt in task.train):
        raise ValueError(
            f"algo={algo.name} needs chosen/rejected rows, or answers by which sampled pairs can be judged, and "
            "the task has neither: choose another task, or another algo"
        )
    if config.samples_per_prompt < 2:
        raise ValueError(
            f"algo={algo.name} makes pairs of one prompt's samples: samples_per_prompt must be at least 2 "
            f"(got {config.samples_per_prompt})"
        )
