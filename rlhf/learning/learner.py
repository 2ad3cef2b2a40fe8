"""The learner: policy, critic where the algorithm has one, and their optimisers; one step's samples -> new weights.

Shapes are those of forward.py: P prompts, B rows, T response tokens. Dropout is off throughout, so that two passes over
the same rows give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.checkpoint.state import State
from rlhf.config import RunConfig
from rlhf.config.algo import AlgoConfig, KlIn, Truncated
from rlhf.config.model import AUTO
from rlhf.learning import advantages as adv
from rlhf.learning import losses
from rlhf.learning.correction import effective_share
from rlhf.learning.estimates import Signal, estimate
from rlhf.learning.forward import Batch, collate
from rlhf.learning.gradient_sums import add_rows
from rlhf.learning.kl_control import KlController
from rlhf.learning.microbatches import Sizes, balanced
from rlhf.learning.objective import clipped, correction_weights, policy_loss
from rlhf.learning.optimizer import clip_gradients, make_optimizer
from rlhf.learning.passes import PADDED, Passes
from rlhf.learning.reference import acting, refresh
from rlhf.learning.schedules import scale
from rlhf.learning.spread import Whole
from rlhf.models.adapter import sent_weights
from rlhf.models.device import device_of
from rlhf.shell.ending import RunError
from rlhf.types import Rollouts

MEASURED = ("mismatch", "w", "w_squared")  # of tokens whose rows have the workers' log-probs
MAX_SKIPPED = 3  # updates in a row whose gradient is not finite, before the run stops


class Learner:
    """Takes gradient steps on a policy; `score` before them, `learn` for them, `weights` for who samples next."""

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        critic: PreTrainedModel | None,
        config: RunConfig,
        passes: Passes = PADDED,
        spread: Whole = Whole(),  # noqa: B008 - it holds nothing
    ) -> None:
        self.policy = policy.eval()
        self.spread = spread
        self.passes = passes
        self.reference = reference
        self.critic = critic
        self.config = config
        self.algo: AlgoConfig = config.rl
        self.kl = KlController(self.algo.kl_coef, self.algo.kl_target, self.algo.kl_horizon)
        self.device = device_of(policy)
        self.optimizer = make_optimizer(policy, config.optim, config.optim.lr)
        self.critic_optimizer = make_optimizer(critic, config.optim, self.algo.critic_lr) if critic else None
        self._weights = sent_weights(policy)  # the same tensors at each push, which it can see
        self._averages: dict[str, Tensor] = {}  # what the reference rounds, where it is one of past policies
        self.fitting_tokens: int | None = None  # of a micro-batch, where they have been measured (fitting.py)
        self.steps = 0
        self.skipped = 0

    def weights(self) -> dict[str, Tensor]:
        """What an update carries: the policy's parameters and persistent buffers, or its adapter, not copied."""
        return self._weights

    def state(self) -> State:
        """What training changes, beside the policy's weights."""
        state = State(
            attributes={"steps": (self, "steps"), "skipped": (self, "skipped"), "kl_coef": (self.kl, "coefficient")},
            optimizers={"policy": (self.policy, self.optimizer)},
            tensors={"averages": self._averages},
        )
        if self.critic is not None and self.critic_optimizer is not None:
            state.modules["critic"] = self.critic
            state.optimizers["critic"] = self.critic, self.critic_optimizer
        if self.reference is not None and self.reference is not self.policy:
            state.modules["reference"] = self.reference
        return state

    def score(self, rollouts: Rollouts) -> Batch:
        """Pad the rows and add what is needed before the update: old and reference log-probs, values. No gradient."""
        batch = collate(rollouts, self.device)
        with torch.no_grad():
            if self.config.updates_per_step > 1:  # the first update's own pass gives its rows' old log-probs
                later = [b for b, p in enumerate(batch.groups) if p not in self._chosen(batch, 0)]
                old_BT = self._over(batch, lambda rows: self._logprobs(self.policy, rows), later)
                batch.old_BT = batch.sampled_BT.index_copy(0, torch.tensor(later, device=self.device), old_BT[later])
            if self.reference is not None:
                with acting(self.reference, self.policy) as reference:
                    batch.ref_BT = self._over(batch, lambda rows: self._logprobs(reference, rows))
            if self.critic is not None:
                critic = self.critic
                batch.values_BT = self._over(batch, lambda rows: self.passes.values(critic, rows))
        return batch

    def learn(self, batch: Batch, rewards_B: Sequence[float | None]) -> dict[str, float]:
        """Rewards -> advantages -> `updates_per_step` optimiser steps; the means of what happened, by name.

        A reward of None leaves its sample out. Raises RunError after three updates in a row without finite
        gradients.
        """
        samples = range(len(rewards_B)) if batch.sample_of_B is None else batch.sample_of_B
        told = [float("nan") if reward is None else reward for reward in rewards_B]
        rewards = torch.tensor([told[sample] for sample in samples], device=self.device)
        batch.mask_BT = batch.mask_BT * (~rewards.isnan())[:, None]
        self._estimate(batch, rewards - self._overlong_penalty(batch))
        if self.algo.truncated is Truncated.drop:
            batch.mask_BT = batch.mask_BT * (~batch.truncated_B)[:, None]
        totals = {"kl_coef": self.kl.coefficient, "lr": self._set_rates()}
        if batch.values_BT is not None and batch.returns_BT is not None:
            totals["explained_variance"] = adv.explained_variance(batch.values_BT, batch.returns_BT, batch.mask_BT)
        updates = self.config.updates_per_step
        counted: dict[str, int] = {}  # updates that measured it: not all have rows with the workers' log-probs
        for update in range(updates):
            rows = [b for b, p in enumerate(batch.groups) if p in self._chosen(batch, update)]
            for name, value in self._update(batch if update else replace(batch, old_BT=None), rows).items():
                totals[name] = totals.get(name, 0.0) + value / updates
                counted[name] = counted.get(name, 0) + 1
        totals |= {name: totals[name] * updates / count for name, count in counted.items() if count < updates}
        self.steps += 1
        if batch.ref_BT is not None:
            kl_B = losses.counted(losses.kl_k1(self._old(batch), batch.ref_BT), batch.mask_BT).sum(dim=1)
            kl_B = kl_B[batch.mask_BT.sum(dim=1) > 0]  # rows that are left out are no rows of 0 nats
            if len(kl_B):
                self.kl.observe(float(kl_B.mean()), len(kl_B))
        if self.reference is not None:
            refresh(self.reference, self.policy, self.algo, self.steps, self._averages)
        return totals

    def drop_gradients(self, batch: Batch) -> None:
        """Inside `spread.whole`, compute what an update on this batch would, and forget it: no weight changes.

        Its rows weigh nothing, as gradients of shards are forgotten only by their sum.
        """
        zeros_BT = torch.zeros_like(batch.mask_BT)
        for name in ("advantages_BT", "ref_BT", "values_BT", "returns_BT"):
            setattr(batch, name, zeros_BT)
        try:
            self._accumulate(batch, torch.zeros_like(batch.mask_BT[:, 0]))
        finally:  # also where memory did not suffice
            for optimizer in (self.optimizer, self.critic_optimizer):
                if optimizer is not None:
                    optimizer.zero_grad(set_to_none=True)

    def _chosen(self, batch: Batch, update: int) -> range:
        """The prompts whose rows an update is made of."""
        prompts, updates = len(batch.prompts), self.config.updates_per_step
        return range(update * prompts // updates, (update + 1) * prompts // updates)

    def _set_rates(self) -> float:
        """Let the schedule set this step's learning rates; the policy's."""
        optim = self.config.optim
        factor = scale(optim.schedule, self.steps, self.config.steps, optim.warmup_steps)
        for optimizer, lr in ((self.optimizer, optim.lr), (self.critic_optimizer, self.algo.critic_lr)):
            for group in optimizer.param_groups if optimizer is not None else ():
                group["lr"] = lr * factor
        return optim.lr * factor

    def _old(self, batch: Batch) -> Tensor:
        """Log-probs under the policy before this step's updates; the workers', where nobody has computed them."""
        return batch.sampled_BT if batch.old_BT is None else batch.old_BT

    def _overlong_penalty(self, batch: Batch) -> Tensor:
        """What long rows lose of their reward, [B]."""
        lengths_B, algo = batch.mask_BT.sum(dim=1), self.algo
        if not algo.overlong_buffer:
            return torch.zeros_like(lengths_B)
        limit = self.config.row_tokens
        return -algo.overlong_penalty * adv.overlong(lengths_B, limit, algo.overlong_buffer)

    def _estimate(self, batch: Batch, rewards_B: Tensor) -> None:
        """Fill in advantages, and returns for a critic."""
        mask_BT = batch.mask_BT
        penalty_BT = torch.zeros_like(mask_BT)
        if self.algo.kl_in is KlIn.reward and batch.ref_BT is not None:
            estimator = losses.KL[self.algo.kl_estimator.value if self.algo.kl_estimator else "k1"]
            penalty_BT = losses.counted(self.kl.coefficient * estimator(self._old(batch), batch.ref_BT), mask_BT)
        prompts = max(batch.groups) + 1
        signal = Signal(rewards_B, penalty_BT, mask_BT, prompts, batch.values_BT, batch.sample_of_B)
        batch.advantages_BT, batch.returns_BT = estimate(self.algo, signal)

    def _update(self, batch: Batch, rows: list[int]) -> dict[str, float]:
        """One optimiser step on these rows, gradients accumulated over micro-batches; the same for any split."""
        weights_B = losses.row_weights(
            self.algo.aggregation.value,
            batch.mask_BT[rows].sum(dim=1),
            self.config.row_tokens,
            torch.tensor(batch.groups, device=self.device)[rows],
        )
        weight_of_B = torch.zeros(len(batch.prompt_of_B), device=self.device)
        weight_of_B[rows] = weights_B
        tokens = float(batch.mask_BT[rows].sum())
        measured = float((batch.mask_BT[rows] * batch.measured_B[rows, None]).sum())
        any_measured, measured = measured > 0, max(1.0, measured)
        sums: dict[str, Tensor] = {}  # on the device, so that nobody waits for it between micro-batches
        batch = batch.with_lengths()
        models = [model for model in (self.critic, self.policy) if model is not None]  # as their gradients come
        with self.spread.whole(*models):
            parts = self.spread.share(self._microbatches(batch, rows))
            for number, (part, counts) in enumerate(parts, start=1):
                if number == len(parts) and self.passes.single:
                    self.spread.expect_last(models)
                own = batch.rows(part) if counts else batch.rows(part).of_no_weight()
                for name, value in self._accumulate(own, weight_of_B[part]).items():
                    sums[name] = sums.get(name, 0.0) + value.double()
            self.spread.add_gradients(models, [o for o in (self.optimizer, self.critic_optimizer) if o is not None])
        values = torch.stack(list(sums.values())).tolist() if sums else []  # a rank may have no rows
        totals = self.spread.ranks.sums(dict(zip(sums, values, strict=True)))
        of = {"loss": 1.0, **dict.fromkeys(MEASURED, measured)}
        means = {name: value / of.get(name, max(1.0, tokens)) for name, value in totals.items()}
        means["ess"] = effective_share(means.pop("w"), means.pop("w_squared"))
        if not any_measured:
            del means["ess"], means["mismatch"]
        if not tokens:  # there is nothing that these could be means of
            means = {"loss": means["loss"]}
        return means | self._step_optimizers(math.isfinite(totals["loss"]))

    def _accumulate(self, batch: Batch, weights_B: Tensor) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch; sums over its tokens, by name."""
        assert batch.advantages_BT is not None
        algo, mask_BT = self.algo, batch.mask_BT
        temperature, entropy_counts = self.config.rollout.temperature, algo.entropy_coef > 0
        logprobs_BT, entropy_BT = self.passes.logprobs_and_entropy(self.policy, batch, temperature, entropy_counts)
        logprobs_BT = losses.counted(logprobs_BT, mask_BT)  # what the environment says may be impossible for the policy
        old_BT = logprobs_BT.detach() if batch.old_BT is None else batch.old_BT
        loss_BT, delta_BT = policy_loss(algo, logprobs_BT, old_BT, batch.advantages_BT, mask_BT)
        loss_BT = loss_BT * correction_weights(algo, old_BT, batch.sampled_BT, mask_BT)
        if entropy_counts:
            loss_BT = loss_BT - algo.entropy_coef * entropy_BT
        w_BT = losses.log_ratio(old_BT, batch.sampled_BT).exp()
        sums = {
            "entropy": entropy_BT.detach(),
            "mismatch": (old_BT - batch.sampled_BT).abs(),
            "clip_fraction": clipped(algo, delta_BT, batch.advantages_BT),
            "approx_kl": losses.kl_k3(old_BT, logprobs_BT.detach()),
            "w": w_BT,
            "w_squared": w_BT.square(),
        }
        sums |= {name: sums[name] * batch.measured_B[:, None] for name in MEASURED}
        if batch.ref_BT is not None:
            kl_BT = losses.kl_in_loss(logprobs_BT, batch.ref_BT, algo.kl_estimator.value if algo.kl_estimator else "k3")
            sums["kl"] = kl_BT.detach()
            if algo.kl_in is KlIn.loss:
                loss_BT = loss_BT + self.kl.coefficient * kl_BT
        loss = (weights_B * losses.counted(loss_BT, mask_BT).sum(dim=1)).sum()
        if self.critic is not None:
            assert batch.values_BT is not None and batch.returns_BT is not None
            values_BT = self.passes.values(self.critic, batch)
            value_BT = losses.value_loss(values_BT, batch.values_BT, batch.returns_BT, algo.value_clip)
            (weights_B * losses.counted(value_BT, mask_BT).sum(dim=1)).sum().backward()
            sums["value_loss"] = value_BT.detach()
        loss.backward()
        return {"loss": loss.detach()} | {
            name: losses.counted(value_BT, mask_BT).sum() for name, value_BT in sums.items()
        }

    def _step_optimizers(self, loss_is_finite: bool) -> dict[str, float]:
        """Clip, step and clear; an update whose loss or gradient is not finite is skipped and counted."""
        optimizers = {"grad_norm": self.optimizer}
        if self.critic_optimizer is not None:
            optimizers["critic_grad_norm"] = self.critic_optimizer
        most = self.config.optim.max_grad_norm
        norms = {
            name: clip_gradients(optimizer, most, self.spread.over_ranks) for name, optimizer in optimizers.items()
        }
        finite = loss_is_finite and all(map(math.isfinite, norms.values()))
        for name, optimizer in optimizers.items():
            warm = name != "grad_norm" or self.critic is None or self.steps >= self.algo.critic_warmup_steps
            if finite and warm:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped >= MAX_SKIPPED:
            raise RunError(
                f"the loss or a gradient was not finite in {MAX_SKIPPED} updates in a row ({norms}): the last weights "
                f"are untouched; lower optim.lr ({self.config.optim.lr}) or look at the rewards"
            )
        return (norms if finite else dict.fromkeys(norms, 0.0)) | {"skipped_updates": float(not finite)}

    def _logprobs(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        return self.passes.logprobs(model, batch, self.config.rollout.temperature)

    def _over(self, batch: Batch, function: Callable[[Batch], Tensor], chosen: Sequence[int] | None = None) -> Tensor:
        """Apply `function` to all (or the chosen) rows by micro-batches; its outputs together, [B, T], 0 elsewhere."""
        batch, out_BT = batch.with_lengths(), torch.zeros_like(batch.mask_BT)
        parts = self._microbatches(batch, range(len(batch.prompt_of_B)) if chosen is None else chosen)
        with self.spread.whole(self.policy, self.reference, self.critic):
            for part, counts in self.spread.share(parts):
                rows = batch.rows(part)
                of_rows = function(rows)
                if counts:
                    out_BT[part, : rows.ids_BT.shape[1]] = of_rows
        return losses.counted(add_rows(out_BT, self.spread.ranks), batch.mask_BT)

    def _microbatches(self, batch: Batch, rows: Sequence[int]) -> list[list[int]]:
        """Split rows into parts of at most `tokens_per_microbatch` tokens (microbatches.py).

        Where that is left to the run, smaller ones on GPUs, so that each rank has as many.
        """
        sizes = Sizes([len(prompt) for prompt in batch.prompts], batch.prompt_of_B, batch.lengths())
        cut, budget = partial(self.passes.split, sizes, rows), self.fitting_tokens or self.config.microbatch_tokens
        if self.device.type == "cuda" and self.config.tokens_per_microbatch == AUTO:
            return balanced(cut, budget, self.spread.ranks.count)
        return cut(budget)
