"""One step's samples and rewards; with dynamic sampling (DAPO, arXiv:2503.14476), of groups that have a signal."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rlhf.config import RunConfig
from rlhf.rewards import rewarded, usable
from rlhf.shell.ending import RunError
from rlhf.types import Completion, Prompt, Reward, RewardReport, Rollouts, Sampler, Told

Rewards = Sequence[float | None]
Scored = tuple[Rollouts, list[float | None]]


class Notes(Protocol):
    """What hears how long sampling and rewards took, and what was noted there: the run's recorder, say."""

    sampled: int

    def time(self, phase: str) -> AbstractContextManager[None]: ...
    def rewarded(self, report: RewardReport) -> None: ...


@dataclass(slots=True)
class Gather:
    """Samples `config.samples_per_prompt` answers a prompt and rewards them.

    With `algo.dynamic_sampling`, groups whose rewards are all equal give way to other prompts, in that many batches at
    most: RunError if there are still too few.
    """

    sampler: Sampler
    reward: Reward
    config: RunConfig
    record: Notes

    def settle(self) -> None:
        """Nothing is drawn but when it is asked for."""

    def release(self) -> None:
        """Nor then."""

    def write(self, folder: Path, step: int) -> None:
        """Nothing is there of the step after this one."""

    def __call__(self, train: Sequence[Prompt], rows: Sequence[int], step: int) -> Scored:
        """The samples of the step's prompts, `train[rows]`, and a reward for each."""
        seed = self.config.seed + step
        rollouts, rewards = self._sampled([train[row] for row in rows], seed)
        batches = self.config.rl.dynamic_sampling
        if not batches:
            return rollouts, rewards
        groups = _with_signal((rollouts, rewards))
        draw = random.Random(seed)
        for batch in range(1, batches):
            if len(groups) >= len(rows):
                break
            others = [train[draw.randrange(len(train))] for _ in rows]
            groups += _with_signal(self._sampled(others, seed + batch * self.config.steps))
        if len(groups) < len(rows):
            raise RunError(
                f"step {step}: {batches} batches have only {len(groups)} prompts with different rewards, of "
                f"{len(rows)} that a step needs: the task is too easy or too hard for the policy by now; raise "
                f"algo.dynamic_sampling ({batches}) or samples_per_prompt, or set algo.dynamic_sampling=0"
            )
        return joined(groups[: len(rows)])

    def _sampled(self, prompts: list[Prompt], seed: int) -> Scored:
        n, temperature = self.config.samples_per_prompt, self.config.rollout.temperature
        with self.record.time("sample"):
            rollouts = self.sampler.sample(prompts, n=n, temperature=temperature, seed=seed)
        self.record.sampled += rollouts.tokens
        with self.record.time("reward"):
            rewards, report = self.rewarded(rollouts)
        if report is not None:
            self.record.rewarded(report)
        return rollouts, self.usable(rewards, report, rollouts)

    def rewarded(self, rollouts: Rollouts) -> tuple[Rewards, RewardReport | None]:
        """A reward for each sample, and what was noted; None of one that cannot be had."""
        rewards = rewarded(self.reward, rollouts)
        return rewards, getattr(self.reward, "report", None)

    def usable(
        self, rewards: Rewards, report: RewardReport | None, rollouts: Rollouts | None = None
    ) -> list[float | None]:
        """The rewards of a batch; RunError if more than `reward.max_failed` of them are missing."""
        episodes = rollouts.episodes if rollouts is not None else ()
        why = next((f"environment {told.failed}: {told.why}" for told in episodes if told.failed), "")
        return usable(rewards, self.config.reward.max_failed, (report.error if report else "") or why)


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt with all that belongs to it."""

    prompt: Prompt
    seed: int
    completions: list[Completion]
    texts: list[str]
    episodes: list[Told]
    rewards: list[float | None]

    @property
    def has_signal(self) -> bool:
        """Whether at least two of its samples have different rewards."""
        return len({reward for reward in self.rewards if reward is not None}) > 1


def groups_of(scored: Scored) -> list[Group]:
    """A batch, prompt by prompt."""
    rollouts, rewards = scored
    n = rollouts.samples_per_prompt
    groups = []
    for p, (prompt, seed) in enumerate(zip(rollouts.prompts, rollouts.seeds, strict=True)):
        of = slice(p * n, (p + 1) * n)
        parts = rollouts.completions[of], rollouts.texts[of], rollouts.episodes[of]
        groups.append(Group(prompt, seed, *parts, rewards[of]))
    return groups


def joined(groups: Sequence[Group]) -> Scored:
    """Groups as a batch; there is at least one."""
    rollouts = Rollouts(
        prompts=[group.prompt for group in groups],
        completions=[completion for group in groups for completion in group.completions],
        texts=[text for group in groups for text in group.texts],
        seeds=[group.seed for group in groups],
        samples_per_prompt=len(groups[0].completions),
        episodes=[told for group in groups for told in group.episodes],
    )
    return rollouts, [reward for group in groups for reward in group.rewards]


def _with_signal(scored: Scored) -> list[Group]:
    return [group for group in groups_of(scored) if group.has_signal]
