"""The policy's objective: an algorithm's choices put together, for one micro-batch of whole rows.

Shapes: B rows, T response tokens. Everything is per token [B, T]; the learner aggregates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.config.algo import AlgoConfig, Correction
from rlhf.learning import correction, losses
from rlhf.plugins.registry import find

Losses = tuple[Tensor, Tensor]  # of each token [B, T], and log of the ratio that is clipped [B, T]


def policy_loss(
    algo: AlgoConfig, logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor
) -> Losses:
    """The loss that `algo.loss` names, and log of the ratio that it clips."""
    make = find("loss", algo.loss).maker()
    loss_BT, delta_BT = make(algo, logprobs_BT, old_BT, advantages_BT, mask_BT)
    return loss_BT, delta_BT.detach()


def clip(algo: AlgoConfig, logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Losses:
    """PPO's clipped surrogate."""
    return _surrogate(algo, losses.log_ratio(logprobs_BT, old_BT), advantages_BT)


def gspo(algo: AlgoConfig, logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Losses:
    """The same with one ratio a row."""
    return _surrogate(algo, losses.sequence_log_ratio(logprobs_BT, old_BT, mask_BT), advantages_BT)


def _surrogate(algo: AlgoConfig, delta_BT: Tensor, advantages_BT: Tensor) -> Losses:
    bounds = algo.clip_low, algo.clip_high, algo.clip_dual
    return losses.clipped_surrogate(delta_BT, advantages_BT, *bounds), delta_BT


def cispo(algo: AlgoConfig, logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Losses:
    """The clipped ratio as a weight of -A log pi."""
    delta_BT = losses.log_ratio(logprobs_BT, old_BT)
    return losses.cispo(delta_BT, logprobs_BT, advantages_BT, algo.clip_low, algo.clip_high), delta_BT


def sapo(algo: AlgoConfig, logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Losses:
    """The ratio through a sigmoid."""
    delta_BT = losses.log_ratio(logprobs_BT, old_BT)
    return losses.sapo(delta_BT, advantages_BT, algo.tau_positive, algo.tau_negative), delta_BT


def reinforce(algo: AlgoConfig, logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Losses:
    """-A log pi."""
    return losses.reinforce(logprobs_BT, advantages_BT), losses.log_ratio(logprobs_BT, old_BT)


def correction_weights(algo: AlgoConfig, old_BT: Tensor, worker_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """What multiplies each token's loss, because a worker sampled it with another probability; [B, T] or [B, 1]."""
    match algo.correction:
        case Correction.tis:
            return correction.truncated(old_BT, worker_BT, algo.correction_high)
        case Correction.icepop:
            return correction.icepop(old_BT, worker_BT, algo.correction_low, algo.correction_high)
        case Correction.sequence:
            return correction.sequence_mask(old_BT, worker_BT, mask_BT, algo.correction_low, algo.correction_high)
        case Correction.off:
            return torch.ones_like(mask_BT[:, :1])


def clipped(algo: AlgoConfig, delta_BT: Tensor, advantages_BT: Tensor) -> Tensor:
    """1 where the ratio is beyond its bound on the side that the advantage pushes it to."""
    ratio_BT = delta_BT.exp()
    high_BT = (advantages_BT > 0) & (ratio_BT > 1 + algo.clip_high)
    low_BT = (advantages_BT < 0) & (ratio_BT < 1 - algo.clip_low)
    return (high_BT | low_BT).float()
