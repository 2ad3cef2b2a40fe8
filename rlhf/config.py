"""The schema of a run: every dial, its default and its rules; imports no torch, so that mistakes answer at once.

Rules inside one group live in that class's `__post_init__`, rules across groups in `RunConfig.__post_init__`. A
message says what was given, what is allowed and which key to change. compose.py makes the choices known to Hydra.
"""

from __future__ import annotations

import enum
import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from rlhf.alarms import AlarmsConfig
from rlhf.algorithm import Advantage, AlgoConfig, DpoConfig, TrainingConfig
from rlhf.rules import at_least, in_range, named_as_part, one_of
from transfer.config import (
    NO_KEEP,
    CollectiveConfig,
    HttpSenderConfig,
    InFlight,
    IpcConfig,
    Library,
    LocalConfig,
    Staging,
    TransferConfig,
    positive,
)

# --- task: prompts, and how an answer is scored -----------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class TaskConfig:
    """Prompts and a gold score; procedural tasks draw their prompts from `seed`, files are read once."""

    held_out: int = 128  # prompts kept for evaluation, never trained on

    def __post_init__(self) -> None:
        at_least("task.held_out", self.held_out, 1)


@dataclass(slots=True, kw_only=True)
class SequenceTaskConfig(TaskConfig):
    """Shared dials of the tasks on a string of letters."""

    letters: int = 6  # size of the alphabet, from "a"
    min_length: int = 3
    max_length: int = 5
    prompts: int = 4096  # distinct training prompts, at most
    demonstration_errors: float = 0.3  # share of a demonstration's letters drawn at random: people err, too

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        in_range("task.demonstration_errors", self.demonstration_errors, 0.0, 1.0)
        in_range("task.letters", self.letters, 2, 26)
        at_least("task.min_length", self.min_length, 1)
        at_least("task.max_length", self.max_length, self.min_length)
        at_least("task.prompts", self.prompts, 1)


@dataclass(slots=True, kw_only=True)
class SortTaskConfig(SequenceTaskConfig):
    """`dbca=` -> `abcd`."""


@dataclass(slots=True, kw_only=True)
class ReverseTaskConfig(SequenceTaskConfig):
    """`dbca=` -> `acbd`."""


@dataclass(slots=True, kw_only=True)
class ArithmeticTaskConfig(TaskConfig):
    """`12+7=` -> `19`."""

    max_number: int = 20  # both operands are drawn from 0..max_number
    operators: str = "+-"
    prompts: int = 4096

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        at_least("task.max_number", self.max_number, 1)
        at_least("task.prompts", self.prompts, 1)
        if not self.operators or set(self.operators) - set("+-*"):
            raise ValueError(f"task.operators must be made of '+', '-' and '*' (got {self.operators!r})")


@dataclass(slots=True, kw_only=True)
class JsonlTaskConfig(TaskConfig):
    """A JSON-lines file as TRL users have it: prompt/answer, prompt/chosen/rejected, or conversations."""

    held_out: int = 64  # rows are fewer than a generator's
    path: str  # the file
    prompt_column: str = "prompt"
    answer_column: str = "answer"


# --- model: the policy and its tokenizer ------------------------------------------------------------------------------


class Precision(enum.Enum):
    """The dtype of a model's weights and arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(enum.Enum):
    """Where models live; auto takes a GPU when there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The policy."""

    dtype: Precision = Precision.float32  # trained in place: bfloat16 rounds steps away below a rate of about 1e-4
    device: Device = Device.auto
    attention: str = "sdpa"  # transformers' attn_implementation

    def __post_init__(self) -> None:
        one_of("model.attention", self.attention, ("sdpa", "eager", "flash_attention_2"))


@dataclass(slots=True, kw_only=True)
class TinyModelConfig(ModelConfig):
    """A transformers architecture made from these numbers, with a character-level tokenizer made from the task."""

    architecture: str = "qwen3"  # or llama, mistral
    layers: int = 3
    hidden: int = 64
    heads: int = 4
    intermediate: int = 192
    context: int = 512  # positions

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        for key in ("layers", "hidden", "heads", "intermediate", "context"):
            at_least(f"model.{key}", getattr(self, key), 1)
        if self.hidden % self.heads:
            raise ValueError(f"model.hidden must be a multiple of model.heads (got {self.hidden} and {self.heads})")


@dataclass(slots=True, kw_only=True)
class HfModelConfig(ModelConfig):
    """Any transformers causal LM with its tokenizer."""

    path: str  # a folder, or a name on the Hugging Face hub


# --- rollout: what samples --------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class RolloutConfig:
    """Rollout workers, each a process with a policy of its own."""

    workers: int = 1
    restarts: int = 2  # how often each worker that dies is started again; 0: the run ends with it
    in_flight: InFlight = InFlight.wait  # completions that are being sampled when new weights arrive
    mismatch_alarm: float | None = 0.1  # as `alarms`: log-probs of worker and trainer differ; mean, nats a token
    max_new_tokens: int = 16
    temperature: float = 1.0
    dtype: Precision | None = None  # null: the policy's own
    rows_per_request: int = 1024  # bounds a worker's memory; the samples are the same for any value
    timeout_s: float = 300.0  # deadline of one request, seconds

    def __post_init__(self) -> None:
        at_least("rollout.workers", self.workers, 1)
        at_least("rollout.restarts", self.restarts, 0)
        if self.mismatch_alarm is not None:
            positive("rollout.mismatch_alarm", self.mismatch_alarm)
        at_least("rollout.max_new_tokens", self.max_new_tokens, 1)
        at_least("rollout.rows_per_request", self.rows_per_request, 1)
        positive("rollout.temperature", self.temperature)
        positive("rollout.timeout_s", self.timeout_s)


@dataclass(slots=True, kw_only=True)
class HfRolloutConfig(RolloutConfig):
    """Engine `hf`: transformers models with a key/value cache, one prefill a prompt."""


# --- reward: (prompt, answer) -> number -------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class RewardConfig:
    """The training signal."""

    max_failed: float = 0.5  # share of a step's samples without a reward, above which the run stops

    def __post_init__(self) -> None:
        in_range("reward.max_failed", self.max_failed, 0.0, 1.0)

    def weighted(self) -> dict[str, RewardPart]:
        """The rewards that this one is made of, by name; itself, named "", where it is no sum."""
        return {"": RewardPart(self)}


@dataclass(slots=True)
class RewardPart:
    """One reward of a sum, and what it is multiplied by."""

    reward: RewardConfig
    weight: float = 1.0


@dataclass(slots=True, kw_only=True)
class VerifierRewardConfig(RewardConfig):
    """The task's own score."""


@dataclass(slots=True, kw_only=True)
class ModelRewardConfig(RewardConfig):
    """A Bradley-Terry reward model: loaded from `path`, or trained on preferences when `path` is null.

    Preferences come from the task's file, else pairs are sampled from the policy and the gold score prefers one.
    """

    path: str | None = None
    prompts: int = 4096  # prompts from which pairs are sampled, at most
    samples: int = 4  # answers sampled a prompt; every two whose gold scores differ make a pair
    label_noise: float = 0.05  # share of sampled pairs whose preference is flipped: people err, too
    steps: int = 300
    prompts_per_batch: int = 32  # with all pairs of each
    lr: float = 2e-3
    centring: float = 0.0  # weight of (s_chosen + s_rejected)^2, which keeps scores around 0 (arXiv:2312.09244)
    held_out: float = 0.1  # share of the pairs kept to measure accuracy and margin

    def __post_init__(self) -> None:
        RewardConfig.__post_init__(self)
        at_least("reward.centring", self.centring, 0)
        at_least("reward.prompts", self.prompts, 1)
        at_least("reward.samples", self.samples, 2)
        in_range("reward.label_noise", self.label_noise, 0.0, 0.5)
        at_least("reward.steps", self.steps, 1)
        at_least("reward.prompts_per_batch", self.prompts_per_batch, 1)
        positive("reward.lr", self.lr)
        in_range("reward.held_out", self.held_out, 0.0, 0.9)


@dataclass(slots=True, kw_only=True)
class FunctionRewardConfig(RewardConfig):
    """The user's `(prompts, completions, **columns) -> list[float | None]`, as `package.module:name`."""

    function: str

    def __post_init__(self) -> None:
        RewardConfig.__post_init__(self)
        module, _, name = self.function.partition(":")
        if not module or not name:
            raise ValueError(f"reward.function must be like package.module:name (got {self.function!r})")


@dataclass(slots=True, kw_only=True)
class HttpRewardConfig(RewardConfig):
    """The user's server: rlhf/rewards/http.py has what it is sent and must answer."""

    url: str
    batch_size: int = 64  # samples a request
    timeout_s: float = 60.0  # deadline of one request, seconds
    retries: int = 3  # of a request, where the server refused the connection or was busy (429, 503 with Retry-After)
    token_variable: str = "RLHF_REWARD_TOKEN"  # the environment variable that has the bearer token, if there is one

    def __post_init__(self) -> None:
        RewardConfig.__post_init__(self)
        _check_url("reward.url", self.url)
        at_least("reward.batch_size", self.batch_size, 1)
        positive("reward.timeout_s", self.timeout_s)
        at_least("reward.retries", self.retries, 0)
        if not (self.token_variable.isascii() and self.token_variable.isidentifier()):
            raise ValueError("reward.token_variable must be the name of an environment variable, not the token itself")


REWARD_PARTS: dict[str, type[RewardConfig]] = {
    "verifier": VerifierRewardConfig,
    "model": ModelRewardConfig,
    "function": FunctionRewardConfig,
    "http": HttpRewardConfig,
}


@dataclass(slots=True, kw_only=True)
class SumRewardConfig(RewardConfig):
    """Several rewards, weighted: `parts={right: {kind: verifier}, short: {kind: http, url: "...", weight: 0.1}}`.

    A part has the keys of its kind, but for `max_failed`, which is the sum's: None of any part leaves the sample out.
    """

    parts: Any  # {name: {kind: ..., weight: 1.0, KEY: VALUE}, ...}; a typed dict takes no new name from Hydra

    def __post_init__(self) -> None:
        RewardConfig.__post_init__(self)
        if not self.parts or not isinstance(self.parts, dict):
            raise ValueError(f"reward.parts must be like {{right: {{kind: verifier}}}} (got {self.parts!r})")
        self.parts = {name: _part(name, given) for name, given in self.parts.items()}
        trained = [
            name
            for name, part in self.parts.items()
            if isinstance(part.reward, ModelRewardConfig) and part.reward.path is None
        ]
        if len(trained) > 1:
            raise ValueError(
                f"reward.parts may have one reward model that is trained here (got {', '.join(trained)}): give "
                f"reward.parts.{trained[-1]}.path"
            )

    def weighted(self) -> dict[str, RewardPart]:
        return self.parts


def _check_url(key: str, url: str) -> None:
    """Raise ValueError, which leaves out what may be a password, unless it is a plain http(s) URL."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"{key} must be like http://127.0.0.1:8000/score (got {url!r})")
    if "@" in parts.netloc:
        raise ValueError(f"{key} must have no user and password in it: a token belongs into the environment")


def _part(name: Any, given: Any) -> RewardPart:
    """What `reward.parts.NAME` says, checked and converted as if it were the only reward."""
    if isinstance(given, RewardPart):
        return given
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"reward.parts: a part's name must be letters, digits and _ (got {name!r})")
    if not isinstance(given, dict):
        raise ValueError(f"reward.parts.{name} must be like {{kind: verifier, weight: 1.0}} (got {given!r})")
    values = dict(given)
    kind, weight = values.pop("kind", None), values.pop("weight", 1.0)
    if not isinstance(kind, str) or kind not in REWARD_PARTS:
        raise ValueError(f"reward.parts.{name}.kind must be one of {', '.join(REWARD_PARTS)} (got {kind!r})")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"reward.parts.{name}.weight must be a finite number (got {weight!r})")
    with named_as_part(name):
        return RewardPart(_typed(kind, values), float(weight))


def _typed(kind: str, values: dict[str, Any]) -> RewardConfig:
    """The schema of this kind with these values, converted as the command line's are."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    schema = REWARD_PARTS[kind]
    keys = [key.name for key in fields(schema) if key.name != "max_failed"]
    if unknown := [key for key in values if key not in keys]:
        raise ValueError(f"reward.{unknown[0]} is no key of {kind}, which has {', '.join(['weight', *keys])}")
    needed = [key.name for key in fields(schema) if key.default is MISSING and key.name not in values]
    if needed:
        raise ValueError(f"reward.{needed[0]} has no value: add it to the part, {{kind: {kind}, {needed[0]}: ...}}")
    node = OmegaConf.structured(schema)
    for key, value in values.items():
        try:
            node[key] = value
        except OmegaConfBaseException as error:
            raise ValueError(f"reward.{key}: {str(error).splitlines()[0]}") from None
    return schema(**{str(key): value for key, value in node.items()})


# --- optim, logger ----------------------------------------------------------------------------------------------------


class Schedule(enum.Enum):
    """How the learning rate goes on after its warm-up (schedules.py)."""

    constant = "constant"
    linear = "linear"  # down to 0 after the last step
    cosine = "cosine"


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """The policy's optimiser."""

    lr: float = 2e-4
    max_grad_norm: float = 1.0
    schedule: Schedule = Schedule.constant  # of RL; the other stages have their own
    warmup_steps: int = 0  # in which the rate grows to lr

    def __post_init__(self) -> None:
        at_least("optim.warmup_steps", self.warmup_steps, 0)
        positive("optim.lr", self.lr)
        positive("optim.max_grad_norm", self.max_grad_norm)


@dataclass(slots=True, kw_only=True)
class AdamWConfig(OptimConfig):
    """Decoupled weight decay (arXiv:1711.05101)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        OptimConfig.__post_init__(self)
        in_range("optim.beta1", self.beta1, 0.0, 1.0)
        in_range("optim.beta2", self.beta2, 0.0, 1.0)


@dataclass(slots=True, kw_only=True)
class LoggerConfig:
    """Where metrics go."""


@dataclass(slots=True, kw_only=True)
class ConsoleLoggerConfig(LoggerConfig):
    """A progress bar per stage and, at the end, a table."""


@dataclass(slots=True, kw_only=True)
class JsonlLoggerConfig(LoggerConfig):
    """`metrics.jsonl` in the run's folder: one object a step."""


@dataclass(slots=True, kw_only=True)
class TensorboardLoggerConfig(LoggerConfig):
    """TensorBoard event files in `tensorboard/` in the run's folder."""


# --- the run ----------------------------------------------------------------------------------------------------------


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
class RunConfig:
    """One run, in the order of its data flow."""

    task: TaskConfig
    model: ModelConfig
    rollout: RolloutConfig
    reward: RewardConfig
    algo: TrainingConfig
    optim: OptimConfig
    transfer: TransferConfig
    logger: dict[str, LoggerConfig] = field(default_factory=dict)
    sft: SftConfig = field(default_factory=SftConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    seed: int = 0
    steps: int = 60
    prompts_per_step: int = 32
    samples_per_prompt: int = 8
    updates_per_step: int = 1  # optimiser steps on one step's samples
    tokens_per_microbatch: int = 16384  # bounds memory only; gradients are the same for any value
    evaluate_every: int = 10  # steps between evaluations on held-out prompts
    threads: int = 1  # torch threads a process; another number changes the last bits of floats

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        for key in ("prompts_per_step", "samples_per_prompt", "updates_per_step", "tokens_per_microbatch"):
            at_least(key, getattr(self, key), 1)
        at_least("evaluate_every", self.evaluate_every, 1)
        at_least("threads", self.threads, 1)
        at_least("seed", self.seed, 0)
        match self.algo:
            case AlgoConfig() as algo:
                self._check_algorithm(algo)
            case DpoConfig() if self.updates_per_step != 1:
                raise ValueError(
                    f"{self.algo.name} takes one optimiser step on a step's pairs: updates_per_step must be 1 "
                    f"(got {self.updates_per_step})"
                )
        check_transfer(self)

    @property
    def rl(self) -> AlgoConfig:
        """The algorithm, in a run that trains by RL."""
        assert isinstance(self.algo, AlgoConfig)
        return self.algo

    def _check_algorithm(self, algo: AlgoConfig) -> None:
        if algo.group_based and self.samples_per_prompt < 2:
            raise ValueError(
                f"{algo.name} compares samples of one prompt: samples_per_prompt must be at least 2 "
                f"(got {self.samples_per_prompt})"
            )
        if algo.advantage is Advantage.gae and algo.critic_warmup_steps >= self.steps:
            raise ValueError(
                f"the policy would never learn: algo.critic_warmup_steps must be less than steps "
                f"(got {algo.critic_warmup_steps} and {self.steps})"
            )
        if algo.overlong_buffer > self.rollout.max_new_tokens:
            raise ValueError(
                f"algo.overlong_buffer is a part of rollout.max_new_tokens: it must be at most "
                f"{self.rollout.max_new_tokens} (got {algo.overlong_buffer})"
            )
        if self.updates_per_step > self.prompts_per_step:
            raise ValueError(
                f"updates_per_step splits the step's prompts: it must be at most prompts_per_step "
                f"({self.prompts_per_step}; got {self.updates_per_step})"
            )


def check_transfer(run: RunConfig | EvaluationConfig) -> None:
    """Raise ValueError where the transfer does not fit the workers or the model."""
    if isinstance(run.transfer, LocalConfig) and run.rollout.workers != 1:
        raise ValueError(
            f"transfer=local samples inside the trainer's process: rollout.workers must be 1 "
            f"(got {run.rollout.workers}); choose transfer=ipc for more"
        )
    if isinstance(run.transfer, LocalConfig) and run.rollout.dtype not in (None, run.model.dtype):
        raise ValueError(
            "transfer=local samples with the learner's own weights: rollout.dtype must be null "
            f"(got {run.rollout.dtype.name})"  # type: ignore[union-attr]
        )
    if isinstance(run.transfer, IpcConfig) and run.transfer.exposes and run.rollout.in_flight is InFlight.keep:
        raise ValueError(NO_KEEP)
    live = isinstance(run.transfer, IpcConfig) and run.transfer.staging is Staging.live
    if live and run.rollout.dtype not in (None, run.model.dtype):
        raise ValueError(
            "transfer.staging=live shares the trainer's own parameters as they are: rollout.dtype must be null "
            f"(got {run.rollout.dtype.name}); choose transfer.staging=arena to cast them"  # type: ignore[union-attr]
        )
    nccl = isinstance(run.transfer, CollectiveConfig) and run.transfer.library is Library.nccl
    if nccl and run.model.device is Device.cpu:
        raise ValueError(
            "transfer=nccl moves weights between GPUs: set model.device=cuda (got cpu), or use transfer=gloo"
        )
    sender = run.transfer.sender
    if isinstance(sender, HttpSenderConfig) and sender.url and isinstance(run.transfer, IpcConfig):
        raise ValueError(
            "transfer.sender.url names workers that already run, and transfer=ipc shares memory only with workers "
            "that this run starts: use transfer=disk with a folder that both sides see, or leave url empty"
        )


@dataclass(slots=True, kw_only=True)
class EvaluateConfig:
    """What is sampled of each held-out prompt, and what is told of it."""

    samples: int = 16  # answers sampled a prompt
    k: list[int] = field(default_factory=lambda: [1, 4, 8])  # pass@k: one of k answers is right (arXiv:2107.03374)

    def __post_init__(self) -> None:
        at_least("evaluate.samples", self.samples, 1)
        for k in self.k:
            at_least("evaluate.k", k, 1)
            if k > self.samples:
                raise ValueError(f"evaluate.k must be at most evaluate.samples ({self.samples}; got {k})")


@dataclass(slots=True, kw_only=True)
class EvaluationConfig:
    """An evaluation of a saved policy alone (python -m rlhf.evaluate)."""

    task: TaskConfig
    model: ModelConfig
    rollout: RolloutConfig
    transfer: TransferConfig
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    seed: int = 0  # with the seed of the policy's run, the held-out prompts are those that it never trained on
    threads: int = 1  # torch threads a process; another number changes the last bits of floats

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)
        at_least("threads", self.threads, 1)
        check_transfer(self)
