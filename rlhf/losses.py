"""Log-probs, advantages -> token losses: pure functions with the papers' names, and how tokens become one number.

Shapes: B rows, T response tokens, V vocabulary. Losses are per token [B, T]; `row_weights` turns them into the
aggregate.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0


def token_logprobs(logits_BTV: Tensor, ids_BT: Tensor, temperature: float) -> Tensor:
    """log pi(id) [B, T] under the sampling distribution softmax(logits / temperature), in fp32."""
    scaled_BTV = logits_BTV.float() / temperature
    chosen_BT = scaled_BTV.gather(-1, ids_BT[..., None]).squeeze(-1)
    return chosen_BT - scaled_BTV.logsumexp(dim=-1)


def entropy(logits_BTV: Tensor, temperature: float) -> Tensor:
    """H [B, T] of softmax(logits / temperature), in nats."""
    scaled_BTV = logits_BTV.float() / temperature
    return scaled_BTV.logsumexp(dim=-1) - (scaled_BTV.softmax(dim=-1) * scaled_BTV).sum(dim=-1)


def log_ratio(logprobs_BT: Tensor, old_BT: Tensor) -> Tensor:
    """delta = log pi - log pi_old, clamped to +-20 so that its exponential stays finite."""
    return (logprobs_BT - old_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(delta_BT: Tensor, advantages_BT: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) (PPO, arXiv:1707.06347; separate bounds: DAPO, arXiv:2503.14476)."""
    ratio_BT = delta_BT.exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(-advantages_BT * ratio_BT, -advantages_BT * clipped_BT)


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


def kl_in_loss(logprobs_BT: Tensor, ref_BT: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2: k3's own gradient on samples of pi is biased."""
    k2_BT, k3_BT = kl_k2(logprobs_BT, ref_BT), kl_k3(logprobs_BT, ref_BT)
    return k2_BT - k2_BT.detach() + k3_BT.detach()


def row_weights(aggregation: str, lengths_B: Tensor, max_tokens: int) -> Tensor:
    """The weight of each token of row b, [B]: sum_b w_b sum_t m_bt L_bt is the aggregate of one optimiser step.

    `lengths_B` counts the sampled tokens of every row of the whole step, whatever its split into micro-batches.
    token_mean (DAPO): 1/N. seq_mean_token_mean (GRPO): 1/(S len_b). seq_mean_token_sum_norm (Dr.GRPO): 1/(S
    max_tokens).
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
    raise AssertionError(aggregation)


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """-log sigmoid(s_chosen - s_rejected), [B] (Bradley and Terry, 1952)."""
    return -torch.nn.functional.logsigmoid(chosen_B - rejected_B)
