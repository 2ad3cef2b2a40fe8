"""The learner: policy, critic where the algorithm has one, and their optimisers; one step's samples -> new weights.

Shapes: P prompts, B rows, L prompt tokens (left-padded), T response tokens (right-padded), V vocabulary. A prompt is
computed once for all of its samples: its keys and values are shared by their rows, with gradients. Dropout is off
throughout, so that two passes over the same rows give the same numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf import advantages as adv
from rlhf import losses
from rlhf.adapter import sent_weights
from rlhf.algorithm import Advantage, AlgoConfig, KlIn, Truncated
from rlhf.checkpoint.state import State
from rlhf.config import RunConfig
from rlhf.correction import effective_share
from rlhf.ending import RunError
from rlhf.kl_control import KlController
from rlhf.microbatches import Sizes, length_groups, split
from rlhf.objective import clipped, correction_weights, policy_loss
from rlhf.optimizer import clip_gradients, make_optimizer
from rlhf.recompute import recomputing
from rlhf.reference import acting, refresh
from rlhf.schedules import scale
from rlhf.types import TRUNCATED, Rollouts

GROUPS = {
    Advantage.group_norm: adv.group_norm,
    Advantage.group_mean: adv.group_mean,
    Advantage.leave_one_out: adv.leave_one_out,
    Advantage.reinforce_pp_baseline: adv.group_mean,
}
MAX_SKIPPED = 3  # updates in a row whose gradient is not finite, before the run stops


@dataclass(slots=True)
class Batch:
    """Rows padded to tensors, and what is known about them before the update; None: this algorithm does not need it."""

    prompts: list[tuple[int, ...]]  # P
    prompt_of_B: list[int]
    ids_BT: Tensor
    mask_BT: Tensor
    sampled_BT: Tensor  # the workers' log-probs
    truncated_B: Tensor  # whether the length limit has cut the row
    old_BT: Tensor | None = None  # None: the policy that is updated is the old one, as in a step's first update
    ref_BT: Tensor | None = None
    values_BT: Tensor | None = None
    advantages_BT: Tensor | None = None
    returns_BT: Tensor | None = None

    def lengths(self, rows: Sequence[int] | slice = slice(None)) -> list[int]:
        """Tokens of each row up to the last that counts, with those before it that the policy did not sample."""
        places_T = torch.arange(1, self.mask_BT.shape[1] + 1, device=self.mask_BT.device)
        return (self.mask_BT[rows] * places_T).amax(dim=1).long().tolist()

    def rows(self, rows: Sequence[int]) -> Batch:
        """These rows alone, padding cut to the longest of them."""
        used = sorted({self.prompt_of_B[row] for row in rows})
        width = max([1, *self.lengths(rows)])

        def cut(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor[rows, :width]

        return Batch(
            prompts=[self.prompts[p] for p in used],
            prompt_of_B=[used.index(self.prompt_of_B[row]) for row in rows],
            truncated_B=self.truncated_B[rows],
            **{name: cut(getattr(self, name)) for name in self.__slots__ if name.endswith("_BT")},
        )


def collate(rollouts: Rollouts, device: torch.device) -> Batch:
    """Pad the rows on the right; the mask comes from who said a token, never from token values."""
    rows = [completion.ids for completion in rollouts.completions]
    width = max(1, *(len(row) for row in rows))

    def pad(values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        padded = [list(row) + [0] * (width - len(row)) for row in values]
        return torch.tensor(padded, dtype=dtype, device=device)

    return Batch(
        prompts=[prompt.ids for prompt in rollouts.prompts],
        prompt_of_B=[b // rollouts.samples_per_prompt for b in range(len(rows))],
        ids_BT=pad(rows, torch.long),
        mask_BT=pad([completion.mask for completion in rollouts.completions], torch.float32),
        sampled_BT=pad([completion.logprobs for completion in rollouts.completions], torch.float32),
        truncated_B=torch.tensor([c.finish_reason == TRUNCATED for c in rollouts.completions], device=device),
    )


def response_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's outputs [B, T, V] at the positions that predict each response token (V = 1 for a critic).

    Prompts are computed once for all of their rows, and short rows apart from long ones where that saves padding.
    """
    device = batch.ids_BT.device
    prompts, cache, first_PV = _prompt_pass(model, batch.prompts, device)
    prompt_of_B = torch.tensor(batch.prompt_of_B, device=device)
    first_BV = first_PV[prompt_of_B]
    logits_BTV = first_BV.new_zeros(*batch.ids_BT.shape, first_BV.shape[-1])
    logits_BTV[:, 0] = first_BV
    for rows, width in length_groups(batch.lengths()):
        of_rows = prompt_of_B[rows]
        with recomputing(model, of_rows) as late:
            logits_BTV[rows, 1:width] = model(
                input_ids=batch.ids_BT[rows, : width - 1],
                attention_mask=prompts.mask(of_rows, width - 1),
                position_ids=prompts.lengths_P[of_rows][:, None] + torch.arange(width - 1, device=device),
                past_key_values=cache if late else _of_rows(cache, of_rows),
                use_cache=True,
            ).logits
    return logits_BTV


@dataclass(slots=True)
class Prompts:
    """Left-padded prompts: their lengths [P], and their mask [P, L] where any is padded."""

    lengths_P: Tensor
    mask_PL: Tensor | None

    def mask(self, prompt_of_rows: Tensor, responses: int) -> Tensor | None:
        """The attention mask of these rows' prompts and `responses` more tokens; None where nothing is padded."""
        if self.mask_PL is None:
            return None
        return torch.nn.functional.pad(self.mask_PL[prompt_of_rows], (0, responses), value=1)


def _prompt_pass(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[Prompts, DynamicCache, Tensor]:
    """Keys and values of all prompts, and the outputs [P, V] that predict each first response token."""
    lengths_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(len(prompt) for prompt in prompts)
    ids_PL = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask_PL = (torch.arange(longest, device=device) >= longest - lengths_P[:, None]).long()
    padded = min(len(prompt) for prompt in prompts) < longest
    cache = DynamicCache(config=model.config)
    last_only = {"logits_to_keep": 1} if model.get_output_embeddings() is not None else {}
    with recomputing(model):
        outputs = model(
            **last_only,
            input_ids=ids_PL,
            attention_mask=mask_PL if padded else None,
            position_ids=(mask_PL.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
    return Prompts(lengths_P, mask_PL if padded else None), cache, outputs.logits[:, -1]


def _of_rows(cache: DynamicCache, prompt_of_rows: Tensor) -> DynamicCache:
    """A cache of its own for these rows; gradients reach the prompts' keys and values."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(prompt_of_rows)
    return chosen


class Learner:
    """Takes gradient steps on a policy; `score` before them, `learn` for them, `weights` for who samples next."""

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        critic: PreTrainedModel | None,
        config: RunConfig,
    ) -> None:
        self.policy = policy.eval()
        self.reference = reference
        self.critic = critic
        self.config = config
        self.algo: AlgoConfig = config.rl
        self.kl = KlController(self.algo.kl_coef, self.algo.kl_target, self.algo.kl_horizon)
        self.device = next(policy.parameters()).device
        self.optimizer = make_optimizer(policy, config.optim, config.optim.lr)
        self.critic_optimizer = make_optimizer(critic, config.optim, self.algo.critic_lr) if critic else None
        self._weights = sent_weights(policy)  # the same tensors at each push, which it can see
        self._averages: dict[str, Tensor] = {}  # what the reference rounds, where it is one of past policies
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
                later = [b for b, p in enumerate(batch.prompt_of_B) if p not in self._chosen(batch, 0)]
                old_BT = self._over(batch, lambda rows: self._logprobs(self.policy, rows), later)
                batch.old_BT = batch.sampled_BT.index_copy(0, torch.tensor(later, device=self.device), old_BT[later])
            if self.reference is not None:
                with acting(self.reference, self.policy) as reference:
                    batch.ref_BT = self._over(batch, lambda rows: self._logprobs(reference, rows))
            if self.critic is not None:
                critic = self.critic
                batch.values_BT = self._over(batch, lambda rows: response_logits(critic, rows).squeeze(-1).float())
        return batch

    def learn(self, batch: Batch, rewards_B: Sequence[float | None]) -> dict[str, float]:
        """Rewards -> advantages -> `updates_per_step` optimiser steps; the means of what happened, by name.

        A reward of None leaves its sample out. Raises RunError after three updates in a row without finite
        gradients.
        """
        rewards = torch.tensor([float("nan") if r is None else r for r in rewards_B], device=self.device)
        batch.mask_BT = batch.mask_BT * (~rewards.isnan())[:, None]
        self._estimate(batch, rewards - self._overlong_penalty(batch))
        if self.algo.truncated is Truncated.drop:
            batch.mask_BT = batch.mask_BT * (~batch.truncated_B)[:, None]
        totals = {"kl_coef": self.kl.coefficient, "lr": self._set_rates()}
        if batch.values_BT is not None and batch.returns_BT is not None:
            totals["explained_variance"] = adv.explained_variance(batch.values_BT, batch.returns_BT, batch.mask_BT)
        updates = self.config.updates_per_step
        for update in range(updates):
            rows = [b for b, p in enumerate(batch.prompt_of_B) if p in self._chosen(batch, update)]
            for name, value in self._update(batch if update else replace(batch, old_BT=None), rows).items():
                totals[name] = totals.get(name, 0.0) + value / updates
        self.steps += 1
        if batch.ref_BT is not None:
            kl_B = (losses.kl_k1(self._old(batch), batch.ref_BT) * batch.mask_BT).sum(dim=1)
            self.kl.observe(float(kl_B.mean()), len(kl_B))
        if self.reference is not None:
            refresh(self.reference, self.policy, self.algo, self.steps, self._averages)
        return totals

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
            penalty_BT = self.kl.coefficient * estimator(self._old(batch), batch.ref_BT) * mask_BT
        if self.algo.group_based:
            penalised_B = rewards_B - penalty_BT.sum(dim=1)
            compared = GROUPS[self.algo.advantage](penalised_B.view(len(batch.prompts), -1))
            batch.advantages_BT = compared.flatten().nan_to_num()[:, None] * mask_BT
            if self.algo.advantage is Advantage.reinforce_pp_baseline:
                batch.advantages_BT = adv.whiten(batch.advantages_BT, mask_BT)
            return
        rho_BT = adv.token_rewards(rewards_B.nan_to_num(), penalty_BT, mask_BT)
        if self.algo.advantage is Advantage.gae:
            assert batch.values_BT is not None
            raw_BT, batch.returns_BT = adv.gae(rho_BT, batch.values_BT, mask_BT, self.algo.gamma, self.algo.lam)
        else:
            raw_BT = adv.reward_to_go(rho_BT, mask_BT, self.algo.gamma)
        batch.advantages_BT = adv.whiten(raw_BT, mask_BT)

    def _update(self, batch: Batch, rows: list[int]) -> dict[str, float]:
        """One optimiser step on these rows, gradients accumulated over micro-batches; the same for any split."""
        weights_B = losses.row_weights(
            self.algo.aggregation.value,
            batch.mask_BT[rows].sum(dim=1),
            self.config.row_tokens,
            torch.tensor(batch.prompt_of_B, device=self.device)[rows],
        )
        weight_of_B = torch.zeros(len(batch.prompt_of_B), device=self.device)
        weight_of_B[rows] = weights_B
        tokens = float(batch.mask_BT[rows].sum().clamp(min=1))
        totals: dict[str, float] = {}
        for part in self._microbatches(batch, rows):
            for name, value in self._accumulate(batch.rows(part), weight_of_B[part]).items():
                totals[name] = totals.get(name, 0.0) + value
        means = {name: value if name == "loss" else value / tokens for name, value in totals.items()}
        means["ess"] = effective_share(means.pop("w"), means.pop("w_squared"))
        return means | self._step_optimizers(math.isfinite(totals["loss"]))

    def _accumulate(self, batch: Batch, weights_B: Tensor) -> dict[str, float]:
        """Add the gradients of one micro-batch; sums over its tokens, by name."""
        assert batch.advantages_BT is not None
        algo, mask_BT = self.algo, batch.mask_BT
        logits_BTV = response_logits(self.policy, batch)
        logprobs_BT = losses.token_logprobs(logits_BTV, batch.ids_BT, self.config.rollout.temperature)
        old_BT = logprobs_BT.detach() if batch.old_BT is None else batch.old_BT
        loss_BT, delta_BT = policy_loss(algo, logprobs_BT, old_BT, batch.advantages_BT, mask_BT)
        loss_BT = loss_BT * correction_weights(algo, old_BT, batch.sampled_BT, mask_BT)
        with torch.set_grad_enabled(algo.entropy_coef > 0):
            entropy_BT = losses.entropy(logits_BTV, self.config.rollout.temperature)
        loss_BT = loss_BT - algo.entropy_coef * entropy_BT
        sums = {
            "entropy": entropy_BT.detach(),
            "mismatch": (old_BT - batch.sampled_BT).abs(),
            "clip_fraction": clipped(algo, delta_BT, batch.advantages_BT),
            "approx_kl": losses.kl_k3(old_BT, logprobs_BT.detach()),
            "w": (w_BT := losses.log_ratio(old_BT, batch.sampled_BT).exp()),
            "w_squared": w_BT.square(),
        }
        if batch.ref_BT is not None:
            kl_BT = losses.kl_in_loss(logprobs_BT, batch.ref_BT, algo.kl_estimator.value if algo.kl_estimator else "k3")
            sums["kl"] = kl_BT.detach()
            if algo.kl_in is KlIn.loss:
                loss_BT = loss_BT + self.kl.coefficient * kl_BT
        loss = (weights_B * (loss_BT * mask_BT).sum(dim=1)).sum()
        if self.critic is not None:
            assert batch.values_BT is not None and batch.returns_BT is not None
            values_BT = response_logits(self.critic, batch).squeeze(-1).float()
            value_BT = losses.value_loss(values_BT, batch.values_BT, batch.returns_BT, algo.value_clip)
            (weights_B * (value_BT * mask_BT).sum(dim=1)).sum().backward()
            sums["value_loss"] = value_BT.detach()
        loss.backward()
        return {"loss": float(loss.detach())} | {k: float((v * mask_BT).sum()) for k, v in sums.items()}

    def _step_optimizers(self, loss_is_finite: bool) -> dict[str, float]:
        """Clip, step and clear; an update whose loss or gradient is not finite is skipped and counted."""
        optimizers = {"grad_norm": self.optimizer}
        if self.critic_optimizer is not None:
            optimizers["critic_grad_norm"] = self.critic_optimizer
        most = self.config.optim.max_grad_norm
        norms = {name: clip_gradients(optimizer, most) for name, optimizer in optimizers.items()}
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
        return losses.token_logprobs(response_logits(model, batch), batch.ids_BT, self.config.rollout.temperature)

    def _over(self, batch: Batch, function: Callable[[Batch], Tensor], chosen: Sequence[int] | None = None) -> Tensor:
        """Apply `function` to all (or the chosen) rows by micro-batches; its outputs together, [B, T], 0 elsewhere."""
        out_BT = torch.zeros_like(batch.mask_BT)
        for part in self._microbatches(batch, range(len(batch.prompt_of_B)) if chosen is None else chosen):
            rows = batch.rows(part)
            out_BT[part, : rows.ids_BT.shape[1]] = function(rows)
        return out_BT * batch.mask_BT

    def _microbatches(self, batch: Batch, rows: Sequence[int]) -> list[list[int]]:
        """Split rows into parts of at most `tokens_per_microbatch` tokens, with little padding (microbatches.py)."""
        lengths = batch.lengths()
        sizes = Sizes([len(prompt) for prompt in batch.prompts], batch.prompt_of_B, lengths)
        return split(sizes, rows, self.config.tokens_per_microbatch)
