"""An algorithm's configuration: one choice a line; what makes no sense together is refused with the reason.

rewards -> shaping -> advantage -> loss (with the workers' log-probs corrected) -> aggregation, and a KL penalty
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from rlhf.config.rules import at_least, in_range
from rlhf.plugins.part import COMPARES, CRITIC
from rlhf.plugins.registry import find
from transfer.config import positive

UNBOUND = ("cispo", "sapo", "reinforce")  # losses without a bound for bad tokens


class Aggregation(enum.Enum):
    """How token losses become one number (losses.py)."""

    token_mean = "token_mean"
    prompt_mean = "prompt_mean"
    seq_mean_token_mean = "seq_mean_token_mean"
    seq_mean_token_sum_norm = "seq_mean_token_sum_norm"


class KlIn(enum.Enum):
    """Where the KL penalty to the reference policy enters."""

    loss = "loss"
    reward = "reward"


class KlEstimator(enum.Enum):
    """How the KL of a token is estimated (losses.py); in the loss, each has the gradient of the true KL."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class Correction(enum.Enum):
    """What is done where worker and trainer give a token different probabilities, w = pi_old / pi_worker."""

    off = "off"
    tis = "tis"  # multiply by w, at most `correction_high`
    icepop = "icepop"  # multiply by w, and leave out tokens whose w is outside of the bounds
    sequence = "sequence"  # leave out rows whose geometric mean of w is outside of the bounds


class Truncated(enum.Enum):
    """What becomes of rows that the length limit has cut."""

    keep = "keep"  # they are learned from as all others
    drop = "drop"  # they count in the group's baseline, and teach nothing


@dataclass(slots=True, kw_only=True)
class TrainingConfig:
    """How the policy is trained after its warm-up: by RL, or on preference pairs."""

    name: str


@dataclass(slots=True, kw_only=True)
class DpoConfig(TrainingConfig):
    """Direct preference optimisation (arXiv:2305.18290): `prompts_per_step` pairs a step, and no sampling.

    Pairs come from the task's file, else `samples_per_prompt` answers are sampled a prompt and the gold score prefers.
    """

    beta: float = 0.1  # the higher, the closer the policy stays to the reference
    prompts: int = 1024  # prompts from which pairs are sampled, at most
    label_noise: float = 0.05  # share of sampled pairs whose preference is flipped: people err, too
    held_out: float = 0.1  # share of the prompts whose pairs are kept to measure loss, accuracy and margin

    def __post_init__(self) -> None:
        positive("algo.beta", self.beta)
        at_least("algo.prompts", self.prompts, 1)
        in_range("algo.label_noise", self.label_noise, 0.0, 0.5)
        in_range("algo.held_out", self.held_out, 0.0, 0.9)


@dataclass(slots=True, kw_only=True)
class AlgoConfig(TrainingConfig):
    """One algorithm of RL; its advantage and its loss are named (rlhf/plugins/builtin.py has ours)."""

    advantage: str  # rewards -> advantages
    loss: str = "clip"  # advantages -> loss of the policy
    aggregation: Aggregation = Aggregation.token_mean
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float | None = None  # bounds the loss of bad tokens at -clip_dual * A; null: no such bound
    tau_positive: float = 1.0  # how fast sapo's gate closes for good tokens,
    tau_negative: float = 1.05  # and for bad ones
    kl_coef: float = 0.2  # 0: no reference policy is kept
    kl_in: KlIn = KlIn.loss
    kl_estimator: KlEstimator | None = None  # null: k1 in the reward, k3 in the loss
    kl_target: float | None = None  # nats a row at which kl_coef is held, by moving it; null: it is fixed
    kl_horizon: int = 10000  # rows after which a KL that is 20 % off has moved kl_coef by 20 %
    ref_every: int = 0  # steps after which the policy becomes its own reference; 0: the reference stays
    ref_decay: float | None = None  # or a moving average of it: the share of the reference that a step keeps
    correction: Correction = Correction.off
    correction_low: float = 0.5
    correction_high: float = 2.0
    truncated: Truncated = Truncated.keep
    overlong_buffer: int = 0  # tokens before rollout.max_new_tokens in which a penalty grows from 0 to
    overlong_penalty: float = 1.0  # this; 0 tokens: no penalty
    dynamic_sampling: int = 0  # batches sampled a step, at most, until all groups have a signal; 0: one, as it is
    gamma: float = 1.0
    lam: float = 0.95  # GAE's lambda
    critic_lr: float = 1e-3
    value_clip: float | None = 0.2
    critic_warmup_steps: int = 5  # steps in which only the critic learns
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        self._check_named()
        for key in ("clip_high", "kl_coef", "entropy_coef", "critic_warmup_steps", "overlong_buffer"):
            at_least(f"algo.{key}", getattr(self, key), 0)
        for key in ("gamma", "lam", "clip_low"):
            in_range(f"algo.{key}", getattr(self, key), 0.0, 1.0)
        at_least("algo.overlong_penalty", self.overlong_penalty, 0)
        at_least("algo.dynamic_sampling", self.dynamic_sampling, 0)
        at_least("algo.kl_horizon", self.kl_horizon, 1)
        for key in ("critic_lr", "tau_positive", "tau_negative"):
            positive(f"algo.{key}", getattr(self, key))
        self._check_kl()
        self._check_ratio()
        if self.dynamic_sampling and not self.group_based:
            raise ValueError(
                f"algo.dynamic_sampling leaves out groups whose rewards are equal, and {self.name} compares no group: "
                f"it must be 0 (got {self.dynamic_sampling})"
            )

    @property
    def group_based(self) -> bool:
        """Whether the advantage compares samples of one prompt, so that one sample alone teaches nothing."""
        return COMPARES in find("advantage", self.advantage).traits

    @property
    def has_critic(self) -> bool:
        """Whether the advantage needs a critic's values."""
        return CRITIC in find("advantage", self.advantage).traits

    def _check_named(self) -> None:
        for part in (find("advantage", self.advantage), find("loss", self.loss)):
            if part.config is not None and not isinstance(self, part.config):
                raise ValueError(f"{part.chosen} has dials of its own: choose algo={part.name} (got algo={self.name})")

    def _check_kl(self) -> None:
        at_least("algo.ref_every", self.ref_every, 0)
        if self.ref_decay is not None:
            in_range("algo.ref_decay", self.ref_decay, 0.0, 1.0)
        if (self.ref_every or self.ref_decay is not None) and not self.kl_coef:
            raise ValueError("algo.ref_every and algo.ref_decay need a reference: algo.kl_coef must be greater than 0")
        if self.ref_every and self.ref_decay is not None:
            raise ValueError(
                f"algo.ref_every ({self.ref_every}) and algo.ref_decay exclude each other: set one of them"
            )
        if self.kl_target is None:
            return
        positive("algo.kl_target", self.kl_target)
        if not self.kl_coef:
            raise ValueError("algo.kl_target moves algo.kl_coef, which must then be greater than 0 (got 0)")

    def _check_ratio(self) -> None:
        if self.clip_dual is not None and self.clip_dual <= 1:
            raise ValueError(f"algo.clip_dual must be greater than 1, or null (got {self.clip_dual})")
        if self.clip_dual is not None and self.loss in UNBOUND:
            raise ValueError(f"algo.clip_dual bounds clip and gspo: with algo.loss={self.loss} it must be null")
        if not 0 <= self.correction_low <= 1 <= self.correction_high:
            raise ValueError(
                "algo.correction_low must be at most 1, and algo.correction_high at least 1 "
                f"(got {self.correction_low} and {self.correction_high})"
            )
