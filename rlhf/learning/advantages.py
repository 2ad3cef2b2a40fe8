"""Rewards -> advantages: pure functions with the papers' names.

Shapes: P prompts, n samples a prompt, B = P*n rows, T response tokens. `mask_BT` is 1 on every sampled token, the
sampled EOS included, else 0. A reward of NaN marks a sample to leave out: it enters no statistic and its advantage is
NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def group_mean(rewards_Pn: Tensor) -> Tensor:
    """A = R - mean of the group (Dr.GRPO, arXiv:2503.20783); exactly 0 where a group's rewards are equal."""
    mean_P1 = rewards_Pn.double().nanmean(dim=1, keepdim=True)
    centred_Pn = (rewards_Pn - mean_P1).to(rewards_Pn.dtype)
    spread_P1 = rewards_Pn.nan_to_num(-torch.inf).amax(1, True) - rewards_Pn.nan_to_num(torch.inf).amin(1, True)
    return torch.where((spread_P1 == 0) & ~rewards_Pn.isnan(), 0.0, centred_Pn)  # no rounding where all are equal


def group_norm(rewards_Pn: Tensor) -> Tensor:
    """A = (R - mean) / (std + 1e-6), std with n - 1 (GRPO, arXiv:2402.03300)."""
    centred_Pn = group_mean(rewards_Pn)
    degrees_P1 = (_count(rewards_Pn) - 1).clamp(min=1)
    std_P1 = (centred_Pn.square().nansum(dim=1, keepdim=True) / degrees_P1).sqrt()
    return centred_Pn / (std_P1 + EPS)


def leave_one_out(rewards_Pn: Tensor) -> Tensor:
    """A = R - mean of the group's other samples (RLOO, arXiv:2402.14740)."""
    count_P1 = _count(rewards_Pn)
    return group_mean(rewards_Pn) * count_P1 / (count_P1 - 1).clamp(min=1)


def overlong(lengths_B: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """0 up to max_tokens - buffer tokens, then falling to -1 at max_tokens, [B] (DAPO, arXiv:2503.14476)."""
    return ((max_tokens - buffer - lengths_B) / buffer).clamp(-1.0, 0.0)


def token_rewards(rewards_B: Tensor, penalty_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """rho_t = -penalty_t, plus R on the last sampled token of each row."""
    steps_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (mask_BT * steps_T).argmax(dim=1)
    rho_BT = -penalty_BT * mask_BT
    return rho_BT.scatter_add(1, last_B[:, None], rewards_B[:, None] * mask_BT.gather(1, last_B[:, None]))


def reward_to_go(rho_BT: Tensor, mask_BT: Tensor, gamma: float) -> Tensor:
    """G_t = rho_t + gamma G_(t+1), over sampled tokens only (REINFORCE++, arXiv:2501.03262)."""
    returns_BT = torch.zeros_like(rho_BT)
    g_B = torch.zeros_like(rho_BT[:, 0])
    for t in reversed(range(rho_BT.shape[1])):
        g_B = torch.where(mask_BT[:, t] > 0, rho_BT[:, t] + gamma * g_B, g_B)
        returns_BT[:, t] = g_B
    return returns_BT * mask_BT


def gae(rho_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns by GAE (arXiv:1506.02438); tokens the policy did not sample are skipped, not zeroed."""
    advantages_BT = torch.zeros_like(rho_BT)
    next_value_B = torch.zeros_like(rho_BT[:, 0])
    g_B = torch.zeros_like(rho_BT[:, 0])
    for t in reversed(range(rho_BT.shape[1])):
        sampled_B = mask_BT[:, t] > 0
        delta_B = rho_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        g_B = torch.where(sampled_B, delta_B + gamma * lam * g_B, g_B)
        next_value_B = torch.where(sampled_B, values_BT[:, t], next_value_B)
        advantages_BT[:, t] = g_B
    advantages_BT = advantages_BT * mask_BT
    return advantages_BT, (advantages_BT + values_BT) * mask_BT


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float:
    """1 - var(returns - values) / var(returns) over the sampled tokens: 1 for a perfect critic, 0 for a constant."""
    sampled = mask_BT > 0
    left, total = (returns_BT - values_BT)[sampled].var(unbiased=False), returns_BT[sampled].var(unbiased=False)
    return float(1 - left / total) if total > 0 and not _equal(returns_BT, mask_BT) else 0.0


def whiten(advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the sampled tokens of the whole batch, exactly 0 where all are equal; unchanged when
    there are fewer than two."""
    count = mask_BT.sum()
    if count < 2:
        return advantages_BT * mask_BT
    if _equal(advantages_BT, mask_BT):  # their mean rounds, and what is left would be divided by hardly anything
        return torch.zeros_like(advantages_BT)
    mean = (advantages_BT * mask_BT).sum() / count
    variance = ((advantages_BT - mean).square() * mask_BT).sum() / (count - 1)
    return (advantages_BT - mean) / (variance + 1e-8).sqrt() * mask_BT


def _equal(values_BT: Tensor, mask_BT: Tensor) -> bool:
    """Whether all sampled tokens have one value."""
    values_N = values_BT[mask_BT > 0]
    return bool((values_N == values_N[:1]).all())


def _count(rewards_Pn: Tensor) -> Tensor:
    return (~rewards_Pn.isnan()).sum(dim=1, keepdim=True).to(rewards_Pn.dtype)
