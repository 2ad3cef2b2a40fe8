"""Log-probs, advantages -> token losses: pure functions with the papers' names, and how tokens become one number.

Shapes: B rows, T response tokens, V vocabulary. Losses are per token [B, T]; `row_weights` turns them into the
aggregate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
PART = 2**22  # numbers that are in fp32 at a time


def token_logprobs(logits_BTV: Tensor, ids_BT: Tensor, temperature: float) -> Tensor:
    """log pi(id) [B, T] under the sampling distribution softmax(logits / temperature), in fp32.

    A few rows of the vocabulary at a time: no second [B, T, V] is kept, neither here nor for the gradient.
    """
    return _TokenLogprobs.apply(logits_BTV, ids_BT, temperature)


class _TokenLogprobs(torch.autograd.Function):
    """x_id / temperature - logsumexp(x / temperature); its gradient is (onehot - softmax) / temperature."""

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, ids_BT: Tensor, temperature: float) -> Tensor:
        """The log-probs [B, T]."""
        rows_NV, ids_N1 = logits_BTV.flatten(0, -2), ids_BT.reshape(-1, 1)
        chosen_N, total_N = rows_NV.new_empty(2, len(rows_NV), dtype=torch.float32)
        for part in _parts(rows_NV):
            scaled_nV = rows_NV[part].float() / temperature
            chosen_N[part] = scaled_nV.gather(1, ids_N1[part])[:, 0]
            total_N[part] = scaled_nV.logsumexp(dim=1)
        ctx.save_for_backward(rows_NV, ids_N1, total_N)
        ctx.temperature, ctx.shape = temperature, logits_BTV.shape
        return (chosen_N - total_N).view(ids_BT.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the logits [B, T, V], in their dtype."""
        rows_NV, ids_N1, total_N = ctx.saved_tensors
        scale_N1 = gradients[0].reshape(-1, 1) / ctx.temperature
        gradient_NV = torch.empty_like(rows_NV)
        for part in _parts(rows_NV):
            softmax_nV = (rows_NV[part].float() / ctx.temperature - total_N[part, None]).exp_()
            gradient_NV[part] = softmax_nV.mul_(-scale_N1[part]).scatter_add_(1, ids_N1[part], scale_N1[part])
        return gradient_NV.view(ctx.shape), None, None


def _parts(rows_NV: Tensor) -> list[slice]:
    """Slices of so many rows that each has about PART numbers."""
    size = max(1, PART // max(1, rows_NV.shape[1]))
    return [slice(start, start + size) for start in range(0, len(rows_NV), size)]


def entropy(logits_BTV: Tensor, temperature: float) -> Tensor:
    """H [B, T] of softmax(logits / temperature), in nats; a few rows of the vocabulary at a time, as log-probs are."""
    return _Entropy.apply(logits_BTV, temperature)


class _Entropy(torch.autograd.Function):
    """logsumexp(z) - sum p z with z = x / temperature, p = softmax(z); its gradient is -p (log p + H) / temperature.

    0 log 0 is 0, in both: a word of the logit -inf cannot be sampled, and counts for nothing.
    """

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, temperature: float) -> Tensor:
        """The entropies [B, T]."""
        rows_NV = logits_BTV.flatten(0, -2)
        total_N, mean_N = rows_NV.new_empty(2, len(rows_NV), dtype=torch.float32)
        for part in _parts(rows_NV):
            scaled_nV = rows_NV[part].float() / temperature
            total_N[part] = scaled_nV.logsumexp(dim=-1)
            softmax_nV = scaled_nV.softmax(dim=-1)
            mean_N[part] = scaled_nV.mul_(softmax_nV).masked_fill_(softmax_nV == 0, 0.0).sum(dim=-1)
        ctx.save_for_backward(rows_NV, total_N, mean_N)
        ctx.temperature, ctx.shape = temperature, logits_BTV.shape
        return (total_N - mean_N).view(logits_BTV.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of the logits [B, T, V], in their dtype: log p + H is z less its mean under p."""
        rows_NV, total_N, mean_N = ctx.saved_tensors
        scale_N1 = gradients[0].reshape(-1, 1) / ctx.temperature
        gradient_NV = torch.empty_like(rows_NV)
        for part in _parts(rows_NV):
            scaled_nV = rows_NV[part].float() / ctx.temperature
            softmax_nV = (scaled_nV - total_N[part, None]).exp_()
            scaled_nV.sub_(mean_N[part, None]).masked_fill_(softmax_nV == 0, 0.0)
            gradient_NV[part] = softmax_nV.mul_(scaled_nV).mul_(-scale_N1[part])
        return gradient_NV.view(ctx.shape), None


def counted(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The values where the mask is 1, else 0, whatever is there: not even NaN or infinity counts."""
    return torch.where(mask_BT > 0, values_BT, 0.0)


def log_ratio(logprobs_BT: Tensor, old_BT: Tensor) -> Tensor:
    """delta = log pi - log pi_old, clamped to +-20 so that its exponential stays finite."""
    return (logprobs_BT - old_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(
    delta_BT: Tensor, advantages_BT: Tensor, clip_low: float, clip_high: float, dual: float | None = None
) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) (PPO, arXiv:1707.06347; separate bounds: DAPO, arXiv:2503.14476).

    `dual`: at most -dual A for tokens with A < 0, however large r is (arXiv:1912.09729).
    """
    ratio_BT = delta_BT.exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    loss_BT = torch.maximum(-advantages_BT * ratio_BT, -advantages_BT * clipped_BT)
    if dual is None:
        return loss_BT
    return torch.where(advantages_BT < 0, torch.minimum(loss_BT, -dual * advantages_BT), loss_BT)


def sequence_log_ratio(logprobs_BT: Tensor, old_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log s, the mean of delta over a row's tokens, at each token [B, T] (GSPO, arXiv:2507.18071).

    The gradient at a token is that of its own log-prob (the paper's GSPO-token): advantages may differ by token.
    """
    length_B1 = mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    mean_B1 = (log_ratio(logprobs_BT, old_BT) * mask_BT).sum(dim=1, keepdim=True) / length_B1
    return mean_B1.detach() + logprobs_BT - logprobs_BT.detach()


def cispo(delta_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-sg[clip(r, 1 - low, 1 + high)] A log pi: clipped tokens keep a gradient (CISPO, arXiv:2506.13585)."""
    weight_BT = delta_BT.exp().clamp(1 - clip_low, 1 + clip_high).detach()
    return -weight_BT * advantages_BT * logprobs_BT


def sapo(delta_BT: Tensor, advantages_BT: Tensor, tau_positive: float, tau_negative: float) -> Tensor:
    """-A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A: the gradient fades beyond r = 1 (arXiv:2511.20347)."""
    tau_BT = torch.where(advantages_BT > 0, tau_positive, tau_negative)
    return -advantages_BT * (4 / tau_BT) * torch.sigmoid(tau_BT * (delta_BT.exp() - 1))


def reinforce(logprobs_BT: Tensor, advantages_BT: Tensor) -> Tensor:
    """-A log pi (Williams, 1992)."""
    return -advantages_BT * logprobs_BT


def value_loss(values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor, clip: float | None) -> Tensor:
    """max((v - R)^2, (v_clipped - R)^2) / 2, v clipped to +-`clip` around the old value (null: no clipping)."""
    loss_BT = (values_BT - returns_BT).square()
    if clip is not None:
        clipped_BT = old_BT + (values_BT - old_BT).clamp(-clip, clip)
        loss_BT = torch.maximum(loss_BT, (clipped_BT - returns_BT).square())
    return loss_BT / 2


def kl_k1(logprobs_BT: Tensor, ref_BT: Tensor) -> Tensor:
    """d = log pi - log pi_ref: unbiased for KL(pi || pi_ref) on samples of pi; for rewards, where no gradient flows."""
    return logprobs_BT - ref_BT


def kl_k2(logprobs_BT: Tensor, ref_BT: Tensor) -> Tensor:
    """d^2 / 2: its gradient on samples of pi is that of KL(pi || pi_ref)."""
    return (logprobs_BT - ref_BT).square() / 2


def kl_k3(logprobs_BT: Tensor, ref_BT: Tensor) -> Tensor:
    """exp(-d) - 1 + d: never negative and of low variance (Schulman, 2020); d clamped to +-20, the value to 10."""
    d_BT = log_ratio(logprobs_BT, ref_BT)
    return ((-d_BT).exp() - 1 + d_BT).clamp(max=10.0)


KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def kl_in_loss(logprobs_BT: Tensor, ref_BT: Tensor, estimator: str = "k3") -> Tensor:
    """The value of an estimator with the gradient of k2: that of k1 is zero on average, that of k3 biased."""
    k2_BT, value_BT = kl_k2(logprobs_BT, ref_BT), KL[estimator](logprobs_BT, ref_BT)
    return k2_BT - k2_BT.detach() + value_BT.detach()


def row_weights(aggregation: str, lengths_B: Tensor, max_tokens: int, prompt_of_B: Tensor | None = None) -> Tensor:
    """The weight of each token of row b, [B]: sum_b w_b sum_t m_bt L_bt is the aggregate of one optimiser step.

    `lengths_B` counts the sampled tokens of every row of the whole step, whatever its split into micro-batches.
    token_mean (DAPO): 1/N. seq_mean_token_mean (GRPO): 1/(S len_b). seq_mean_token_sum_norm (Dr.GRPO): 1/(S
    max_tokens). prompt_mean: the token mean of each prompt's rows, averaged over prompts that have tokens.
    """
    lengths_B = lengths_B.to(torch.float32)
    rows = (lengths_B > 0).sum().clamp(min=1)
    match aggregation:
        case "token_mean":
            return torch.ones_like(lengths_B) / lengths_B.sum().clamp(min=1)
        case "seq_mean_token_mean":
            return 1.0 / (rows * lengths_B.clamp(min=1))
        case "seq_mean_token_sum_norm":
            return torch.ones_like(lengths_B) / (rows * max_tokens)
        case "prompt_mean":
            assert prompt_of_B is not None
            tokens_P = lengths_B.new_zeros(int(prompt_of_B.max()) + 1).index_add(0, prompt_of_B, lengths_B)
            return 1.0 / ((tokens_P > 0).sum().clamp(min=1) * tokens_P[prompt_of_B].clamp(min=1))
    raise AssertionError(aggregation)


def bradley_terry(
    chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | float = 0.0, centring: float = 0.0
) -> Tensor:
    """-log sigmoid(s_chosen - s_rejected - margin) + centring (s_chosen + s_rejected)^2, [B].

    Bradley and Terry, 1952; margin: arXiv:2307.09288; centring, which keeps scores around 0: arXiv:2312.09244.
    """
    fit_B = -torch.nn.functional.logsigmoid(chosen_B - rejected_B - margin_B)
    return fit_B + centring * (chosen_B + rejected_B).square()


def dpo(chosen_B: Tensor, rejected_B: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)), [B]; both are log pi - log pi_ref of whole answers (arXiv:2305.18290)."""
    return -torch.nn.functional.logsigmoid(beta * (chosen_B - rejected_B))
