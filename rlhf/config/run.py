"""A run and an evaluation: the groups together, the dials outside of groups, and the rules across groups."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from rlhf.config.ahead_rules import check_ahead
from rlhf.config.alarms import AlarmsConfig
from rlhf.config.algo import AlgoConfig, Correction, DpoConfig, KlIn, TrainingConfig
from rlhf.config.checkpoint import CheckpointConfig
from rlhf.config.cut import WHOLE, Cut, refuse_in_training
from rlhf.config.logger import LoggerConfig
from rlhf.config.model import AUTO, Device, ModelConfig
from rlhf.config.optim import OptimConfig
from rlhf.config.reward import ModelRewardConfig, RewardConfig
from rlhf.config.rollout import Logprobs, RolloutConfig, VllmRolloutConfig
from rlhf.config.rules import at_least
from rlhf.config.task import TaskConfig
from rlhf.config.trainer import ShardedConfig, TrainerConfig
from rlhf.config.transfer_rules import check_transfer, choose_take
from transfer.agreement.shown import shown
from transfer.config import (
    CollectiveConfig,
    Library,
    TransferConfig,
    check_takes_shards,
    positive,
)

TOKENS = 16384  # of a micro-batch, by default


@dataclass(slots=True, kw_only=True)
class SftConfig:
    """The supervised warm-up on the task's demonstrations; `steps=0` leaves it out."""

    steps: int = 200
    batch_size: int = 64
    lr: float = 3e-3

    def __post_init__(self) -> None:
        at_least("sft.steps", self.steps, 0)
        at_least("sft.batch_size", self.batch_size, 1)
        positive("sft.lr", self.lr)


@dataclass(slots=True, kw_only=True)
class EvaluateConfig:
    """What is sampled of each held-out prompt, and what is told of it."""

    samples: int = 1  # answers sampled a prompt, beside the greedy one
    k: list[int] = field(default_factory=lambda: [1])  # pass@k: one of k answers is right (arXiv:2107.03374)
    temperature: float | None = None  # of the sampled answers; null: rollout.temperature, as of those below
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        at_least("evaluate.samples", self.samples, 1)
        if self.temperature is not None:
            positive("evaluate.temperature", self.temperature)
        self.cut(WHOLE).check("evaluate")
        for k in self.k:
            at_least("evaluate.k", k, 1)
            if k > self.samples:
                raise ValueError(f"evaluate.k must be at most evaluate.samples ({self.samples}; got {k})")

    def cut(self, rollout: Cut) -> Cut:
        """Tokens that are never sampled, where `rollout` says so of all samples."""
        told: dict[str, Any] = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        return replace(rollout, **{name: value for name, value in told.items() if value is not None})


@dataclass(slots=True, kw_only=True)
class ProfileConfig:
    """Which steps are traced by torch.profiler, into `profile/`."""

    steps: list[int] = field(default_factory=list)


class Mode(Enum):
    """What `python -m rlhf.train` does with the configuration."""

    train = "train"
    check = "check"  # validate, tell what the run would need, and make one step in a folder that is removed again


class Objective(Enum):
    """A number of a run's summary by which a sweep sorts its leaderboard, and which an optimiser of dials is told."""

    gold = "gold"
    reward = "reward"
    greedy_accuracy = "greedy_accuracy"
    pass_at_k = "pass_at_k"  # of the largest of evaluate.k
    pair_accuracy = "pair_accuracy"
    kl = "kl"
    tokens_per_second = "tokens_per_second"
    step_ms = "step_ms"
    transfer_ms = "transfer_ms"
    transfer_share = "transfer_share"
    seconds = "seconds"

    @property
    def key(self) -> str:
        """Its name in `summary.json`; of pass_at_k there is one for each k."""
        ends = (Objective.gold, Objective.reward, Objective.greedy_accuracy, Objective.pair_accuracy, Objective.kl)
        return f"{self.value}_end" if self in ends else self.value

    @property
    def smaller_is_better(self) -> bool:
        """Which end of the leaderboard is the top."""
        times = (Objective.step_ms, Objective.transfer_ms, Objective.transfer_share, Objective.seconds)
        return self is Objective.kl or self in times


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """One run, in the order of its data flow."""

    task: TaskConfig
    model: ModelConfig
    rollout: RolloutConfig
    reward: RewardConfig
    algo: TrainingConfig
    optim: OptimConfig
    transfer: TransferConfig
    trainer: TrainerConfig
    logger: dict[str, LoggerConfig] = field(default_factory=dict)
    sft: SftConfig = field(default_factory=SftConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mode: Mode = Mode.train
    plugins: list[str] = field(default_factory=list)  # modules that register parts of your own, package.module each
    seed: int = 0
    steps: int = 60
    prompts_per_step: int = 32
    samples_per_prompt: int = 8
    updates_per_step: int = 1  # optimiser steps on one step's samples
    tokens_per_microbatch: Any = AUTO  # bounds memory only; gradients are the same for any value. auto: what fits the
    # GPU, measured at the start, else TOKENS
    evaluate_every: int = 10  # steps between evaluations on held-out prompts
    threads: int = 1  # torch threads a process; another number changes the last bits of floats
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    objective: Objective | None = None  # of sweeps: what they are sorted by; null: gold, or reward where there is none

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        for key in ("prompts_per_step", "samples_per_prompt", "updates_per_step"):
            at_least(key, getattr(self, key), 1)
        if self.tokens_per_microbatch != AUTO:
            whole = isinstance(self.tokens_per_microbatch, int) and not isinstance(self.tokens_per_microbatch, bool)
            if not whole or self.tokens_per_microbatch < 1:
                given = self.tokens_per_microbatch
                raise ValueError(
                    f"tokens_per_microbatch must be auto or a whole number of at least 1 (got {shown(given)})"
                )
        at_least("evaluate_every", self.evaluate_every, 1)
        at_least("threads", self.threads, 1)
        at_least("seed", self.seed, 0)
        for step in self.profile.steps:
            if not 1 <= step <= self.steps:
                raise ValueError(f"profile.steps must be steps of the run, 1 to {self.steps} (got {step})")
        match self.algo:
            case AlgoConfig() as algo:
                self._check_algorithm(algo)
            case DpoConfig() if self.updates_per_step != 1:
                raise ValueError(
                    f"{self.algo.name} takes one optimiser step on a step's pairs: updates_per_step must be 1 "
                    f"(got {self.updates_per_step})"
                )
        if self.task.most_answers > 1:
            self._check_conversation()
        refuse_in_training(self.rollout.cut)
        check_ahead(self)
        choose_take(self, sharded=isinstance(self.trainer, ShardedConfig))
        check_transfer(self)
        self._check_trainer()

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of a micro-batch, at most, where nobody has measured what fits."""
        return TOKENS if self.tokens_per_microbatch == AUTO else int(self.tokens_per_microbatch)

    @property
    def row_tokens(self) -> int:
        """Tokens that the policy may sample of one row, at most."""
        return self.rollout.max_new_tokens * self.task.most_answers

    @property
    def rl(self) -> AlgoConfig:
        """The algorithm, in a run that trains by RL."""
        assert isinstance(self.algo, AlgoConfig)
        return self.algo

    def _check_trainer(self) -> None:
        if self.trainer.gpus is not None and self.model.device is Device.cpu:
            raise ValueError("trainer.gpus is for ranks on GPUs: leave it out, or set model.device=cuda (got cpu)")
        if isinstance(self.trainer, ShardedConfig):
            self._check_sharded()

    def _check_sharded(self) -> None:
        check_takes_shards(self.transfer, self.trainer.hosts)
        if self.model.lora.rank:
            raise ValueError(
                "the adapter's base is frozen and whole in every rank: set trainer=replicas, or model.lora.rank=0 "
                f"(got trainer=sharded and {self.model.lora.rank})"
            )
        nccl = isinstance(self.transfer, CollectiveConfig) and self.transfer.library is Library.nccl
        if nccl and isinstance(self.trainer, ShardedConfig) and self.trainer.offload:
            raise ValueError(
                "transfer=nccl sends weights from GPUs, and trainer.offload=true has them in the host's memory: set "
                "transfer=ipc, disk or gloo, or trainer.offload=false"
            )

    def _check_conversation(self) -> None:
        if isinstance(self.algo, DpoConfig):
            raise ValueError(
                f"{self.algo.name} compares two answers to one prompt, and this task is a conversation of up to "
                f"{self.task.most_answers} answers: set {self.task.turns_key}=1, or choose another algo"
            )
        for part in self.reward.weighted().values():
            if isinstance(part.reward, ModelRewardConfig):
                raise ValueError(
                    "a reward model reads a prompt and one answer, and this task is a conversation of up to "
                    f"{self.task.most_answers} answers: choose reward=verifier, or set {self.task.turns_key}=1"
                )

    def _check_algorithm(self, algo: AlgoConfig) -> None:
        if self.rollout.logprobs is Logprobs.sample and needs_logprobs(algo):
            raise ValueError(
                "rollout.logprobs=sample leaves rows without the workers' log-probs, which algo.correction, "
                "algo.kl_in=reward and algo.kl_target compute with: set rollout.logprobs=auto"
            )
        if algo.group_based and self.samples_per_prompt < 2:
            raise ValueError(
                f"{algo.name} compares samples of one prompt: samples_per_prompt must be at least 2 "
                f"(got {self.samples_per_prompt})"
            )
        if algo.has_critic and algo.critic_warmup_steps >= self.steps:
            raise ValueError(
                f"the policy would never learn: algo.critic_warmup_steps must be less than steps "
                f"(got {algo.critic_warmup_steps} and {self.steps})"
            )
        if algo.overlong_buffer > self.row_tokens:
            raise ValueError(
                f"algo.overlong_buffer is a part of rollout.max_new_tokens: it must be at most "
                f"{self.row_tokens} (got {algo.overlong_buffer})"
            )
        if self.model.lora.rank and (algo.ref_every or algo.ref_decay is not None):
            raise ValueError(
                "the reference of an adapter is the base below it, which stays: set algo.ref_every=0 and "
                f"algo.ref_decay=null (got {algo.ref_every} and {algo.ref_decay}), or model.lora.rank=0"
            )
        if self.updates_per_step > self.prompts_per_step:
            raise ValueError(
                f"updates_per_step splits the step's prompts: it must be at most prompts_per_step "
                f"({self.prompts_per_step}; got {self.updates_per_step})"
            )


def needs_logprobs(algo: TrainingConfig) -> bool:
    """Whether the objective computes with the workers' log-probs, so that every row must have them.

    A correction does; and where there is a reference, its KL in the reward and the controller of its coefficient do,
    as they come before the first update, whose pass gives the policy's own.
    """
    if not isinstance(algo, AlgoConfig):
        return False
    before_updates = algo.kl_in is KlIn.reward or algo.kl_target is not None
    return algo.correction is not Correction.off or (algo.kl_coef > 0 and before_updates)


def all_logprobs(run: RunConfig | EvaluationConfig) -> bool:
    """Whether the workers are asked for the log-probs of all rows, rather than of a sample of them."""
    if run.rollout.logprobs is not Logprobs.auto:
        return run.rollout.logprobs is Logprobs.all
    if not isinstance(run.rollout, VllmRolloutConfig):
        return True  # engine hf has them anyway
    return isinstance(run, RunConfig) and needs_logprobs(run.algo)


@dataclass(slots=True, kw_only=True)
class EvaluationConfig:
    """An evaluation of a saved policy alone (python -m rlhf.evaluate)."""

    task: TaskConfig
    model: ModelConfig
    rollout: RolloutConfig
    transfer: TransferConfig
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    plugins: list[str] = field(default_factory=list)  # modules that register parts of your own, package.module each
    seed: int = 0  # with the seed of the policy's run, the held-out prompts are those that it never trained on
    threads: int = 1  # torch threads a process; another number changes the last bits of floats

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)
        at_least("threads", self.threads, 1)
        if self.model.lora.rank:
            raise ValueError(
                f"model.lora.rank must be 0: a run's policy/ has its adapter merged (got {self.model.lora.rank})"
            )
        choose_take(self, sharded=False)
        check_transfer(self)
