"""Do the workers compute what the trainer computes? A few fixed prompts are sampled, and their log-probs compared.

A digest shows that the bytes arrived; this shows that they are used: a stale or half-loaded model, another dtype or
another attention than the trainer's are all seen here, whatever their cause.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlhf.config import Precision, RunConfig
from rlhf.learning.forward import collate
from rlhf.learning.passes import PADDED, Passes
from rlhf.learning.spread import Whole
from rlhf.models.device import device_of
from rlhf.shell.ending import RunError
from rlhf.types import Prompt, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS_PER_WORKER = 4
SEED = 7_000_003  # the probe's samples are the same at each call, but for the weights
TOLERANCE = {Precision.float32: 1e-3, Precision.bfloat16: 0.5}  # nats, of the least exact dtype; the largest difference


class Probe:
    """Compares log-probs of workers and trainer when `transfer.verify_every` says so."""

    def __init__(
        self,
        policy: PreTrainedModel,
        prompts: list[Prompt],
        sampler: Sampler,
        config: RunConfig,
        passes: Passes = PADDED,
        spread: Whole = Whole(),  # noqa: B008 - it holds nothing
    ) -> None:
        self._spread = spread
        self._policy = policy
        self._passes = passes
        self._prompts = prompts
        self.workers = config.rollout.workers  # that there are
        self._sampler = sampler
        self._temperature = config.rollout.temperature
        self._every = config.transfer.verify_every
        dtypes = {config.model.dtype, config.rollout.dtype or config.model.dtype}
        self.tolerance = config.transfer.verify_tolerance or max(TOLERANCE[dtype] for dtype in dtypes)
        self._pushes = 0

    def __call__(self, version: int) -> float | None:
        """After each push: the largest difference in nats, or None when no probe is due; RunError beyond tolerance."""
        due = self._pushes == 0 or (self._every > 0 and self._pushes % self._every == 0)
        self._pushes += 1
        if not due:
            return None
        prompts = self._prompts[: PROMPTS_PER_WORKER * self.workers]
        rollouts = self._sampler.sample(prompts, n=1, temperature=self._temperature, seed=SEED)
        batch = collate(rollouts, device_of(self._policy))
        with torch.no_grad(), self._spread.whole(self._policy):
            logprobs_BT = self._passes.logprobs(self._policy, batch, self._temperature)
        worst = float(((logprobs_BT - batch.sampled_BT).abs() * batch.mask_BT * batch.measured_B[:, None]).max())
        if not worst <= self.tolerance:
            raise RunError(
                f"version {version}: the workers' log-probs differ from the trainer's by up to {worst:.3g} nats, more "
                f"than {self.tolerance:g} (transfer.verify_tolerance): they do not sample with the weights that were "
                "sent, or compute with them in another way"
            )
        return worst
