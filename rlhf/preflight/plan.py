"""Before a run: what its numbers multiply to, which files it will write, and whether configuration and data fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf.compose import choice
from rlhf.config import (
    ModelRewardConfig,
    RunConfig,
)
from rlhf.config.algo import DpoConfig
from rlhf.config.model import AUTO
from rlhf.config.trainer import TrainerConfig
from rlhf.monitor.loggers import is_service
from rlhf.plugins.registry import part_of
from rlhf.preflight.amounts import check_amounts, judged_by_amounts
from rlhf.ranks.place import by_torchrun
from rlhf.reports.lanes import FILE as LANES
from rlhf.rewards import check_reward
from rlhf.stages.dpo import check_count
from rlhf.types import Task
from transfer.config import DiskConfig, HttpSenderConfig, IpcConfig, LocalConfig, RaySenderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def in_one_line(config: RunConfig, policy: PreTrainedModel) -> str:
    """The run in one line: what its numbers multiply to."""
    rows = config.prompts_per_step * config.samples_per_prompt
    step = (
        f"{config.prompts_per_step} pairs"
        if isinstance(config.algo, DpoConfig)
        else f"{config.prompts_per_step} prompts x {config.samples_per_prompt} samples "
        f"({rows} rows a step, {config.updates_per_step} update(s))"
    )
    lora = f", an adapter of rank {config.model.lora.rank}" if config.model.lora.rank else ""
    by = "/".join(choice(part) for part in (config.transfer, config.transfer.sender))
    taken = f", take={config.transfer.take.value}" if isinstance(config.transfer, IpcConfig) else ""
    return (
        f"{choice(config.task)}: {config.steps} steps x {step}; "
        f"{policy.num_parameters():,} parameters{lora} on {policy.device}; "
        f"{config.rollout.workers} worker(s), weights by {by}{taken}"
    )


def arithmetic(config: RunConfig, task: Task) -> list[tuple[str, str]]:
    """The same in a line a number: what it is, and how it comes about."""
    steps, prompts = config.steps, config.prompts_per_step
    if isinstance(config.algo, DpoConfig):
        return [("pairs", f"{steps} steps x {prompts} = {steps * prompts:,}"), *_beside_steps(config, task)]
    rows, tokens = prompts * config.samples_per_prompt, config.row_tokens
    passes = steps * prompts / len(task.train)
    return [
        ("rows a step", f"{prompts} prompts x {config.samples_per_prompt} samples = {rows:,}"),
        ("tokens a step", f"{rows:,} rows x {tokens} = {rows * tokens:,} sampled, at most"),
        *_learning(config, task),
        ("each worker", f"{math.ceil(rows / config.rollout.workers):,} rows a step"),
        (
            "prompts",
            f"{steps} steps x {prompts} = {steps * prompts:,}: {passes:.2g} x the {len(task.train):,} of the task",
        ),
        *_beside_steps(config, task),
    ]


def _learning(config: RunConfig, task: Task) -> list[tuple[str, str]]:
    """What a step's rows are divided into."""
    updates, bound = config.updates_per_step, config.microbatch_tokens
    prompts = math.ceil(config.prompts_per_step / updates)
    rows = prompts * config.samples_per_prompt
    longest = config.row_tokens + max(len(prompt.ids) for prompt in task.train)
    fit = max(1, bound // longest)
    return [
        ("updates", f"{updates} a step, each of {rows:,} rows at most; {config.steps * updates:,} in all"),
        (
            "micro-batches",
            f"{math.ceil(rows / fit)} an update: {fit:,} of the longest rows ({longest} tokens) fit in {bound:,}",
        ),
    ]


def _beside_steps(config: RunConfig, task: Task) -> list[tuple[str, str]]:
    """Evaluations and checkpoints."""
    count = 1 + math.ceil(config.steps / config.evaluate_every)
    held_out, answers = len(task.held_out), config.evaluate.samples + 1
    every = config.checkpoint.every
    saves = len({config.steps, *range(0, config.steps, every)}) if every else 0
    best = ", and those of evaluations that are the best so far" if saves and config.checkpoint.keep_best else ""
    evaluated = f"{count} x {held_out} held-out prompts x {answers} = {count * held_out * answers:,} answers"
    return [("evaluations", evaluated), ("checkpoints", f"{saves or 'none'}{best}")]


def files(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What a run writes into its folder, and what each is."""
    yield ".hydra/", "the configuration and the overrides, which a resume needs"
    for logger in config.logger.values():
        yield from part_of(logger).writes.items()
    if any(map(is_service, config.logger.values())):
        yield "services/", "by which name each service knows the run, for a resume"
    if not isinstance(config.algo, DpoConfig):
        yield "samples.jsonl", "prompts, answers, rewards"
    yield LANES, "when the trainer and each worker were busy, at most 2 MB"
    if config.checkpoint.every:
        yield "checkpoints/", "from which python -m rlhf.resume goes on"
    yield "policy/", "the trained policy, a Hugging Face folder"
    if config.model.lora.rank:
        yield "adapter/", "the adapter alone, as peft has it"
        yield "base/", "what the adapter builds on, unless model.path has it"
    if any(
        isinstance(p.reward, ModelRewardConfig) and p.reward.path is None for p in config.reward.weighted().values()
    ):
        yield "reward_model/", "the reward model that is trained first, a Hugging Face folder"
    if isinstance(config.transfer, DiskConfig):
        yield config.transfer.path or "weights/", f"the newest {config.transfer.keep} versions of the weights"
    if config.profile.steps:
        steps = ", ".join(map(str, config.profile.steps))
        workers = "" if isinstance(config.transfer, LocalConfig) else " and of each worker"
        yield "profile/", f"traces of the steps {steps}, of the trainer{workers}, at most 50 MB each"
    yield "journal/", "what each process did with weights"
    yield from _of_workers(config)
    yield from _of_ranks(config.trainer)
    yield "status.json", "where the run is, every second"
    yield "summary.json", "the numbers of the table at its end"
    yield "curves.png", "rewards, KL and the time of a step"


def _of_ranks(trainer: TrainerConfig) -> Iterator[tuple[str, str]]:
    """Logs of ranks beside the first, but where torchrun has started them."""
    if by_torchrun() is None:
        numbers = ["N"] if trainer.ranks == AUTO else range(1, trainer.ranks)
        yield from ((f"rank-{number}.log", "what another rank of the trainer printed") for number in numbers)


def _of_workers(config: RunConfig) -> Iterator[tuple[str, str]]:
    sender = config.transfer.sender
    if isinstance(sender, HttpSenderConfig) and not sender.url and not isinstance(config.transfer, LocalConfig):
        yield from ((f"worker-{index}.log", "what the worker printed") for index in range(config.rollout.workers))
    if isinstance(sender, RaySenderConfig) and sender.address is None:
        yield from ((f"worker-{index}.log", "its stacks, if it is asked") for index in range(config.rollout.workers))


def check_data(config: RunConfig, task: Task) -> None:
    """Raise ValueError or RunError, before anything is trained, where configuration, data and reward do not fit."""
    check_rows(config, task)
    if not judged_by_amounts(config):
        check_reward(config.reward, task)


def check_rows(config: RunConfig, task: Task) -> None:
    """Raise ValueError where too few rows of a kind are left to learn from."""
    check_amounts(config, task)
    if isinstance(config.algo, DpoConfig):
        check_count(config, config.algo, task)
