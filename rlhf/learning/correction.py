"""Where worker and trainer give the same tokens different probabilities: importance weights, and how bad it is.

w = pi_old / pi_worker for each sampled token: the trainer's policy before the update over what the worker sampled from.
Shapes: B rows, T response tokens. Weights are detached; they multiply the loss of a token before aggregation.
"""

from __future__ import annotations

from torch import Tensor

from rlhf.learning.losses import log_ratio


def truncated(old_BT: Tensor, worker_BT: Tensor, high: float) -> Tensor:
    """min(w, high) (TIS; Yao et al., 2025: "Your efficient RL framework secretly brings you off-policy RL")."""
    return log_ratio(old_BT, worker_BT).exp().clamp(max=high).detach()


def icepop(old_BT: Tensor, worker_BT: Tensor, low: float, high: float) -> Tensor:
    """w where low <= w <= high, else 0: the token is left out (IcePop, Ring team, 2025)."""
    w_BT = log_ratio(old_BT, worker_BT).exp().detach()
    return w_BT * ((w_BT >= low) & (w_BT <= high))


def sequence_mask(old_BT: Tensor, worker_BT: Tensor, mask_BT: Tensor, low: float, high: float) -> Tensor:
    """1 for rows whose geometric mean of w is within the bounds, else 0, [B, 1].

    The mean, since the product of a long row's ratios leaves any bounds however close each of them is to 1.
    """
    w_B1 = geometric_mean(old_BT, worker_BT, mask_BT).exp()[:, None]
    return ((w_B1 >= low) & (w_B1 <= high)).to(old_BT.dtype)


def geometric_mean(old_BT: Tensor, worker_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log of the geometric mean of w over each row's tokens, [B]."""
    delta_BT = log_ratio(old_BT, worker_BT).detach() * mask_BT
    return delta_BT.sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)


def effective_share(mean: float, mean_of_squares: float) -> float:
    """ESS / N = (mean w)^2 / mean w^2, in (0, 1]: 1 where all samples count alike (Kong, 1992)."""
    return mean * mean / mean_of_squares if mean_of_squares > 0 else 1.0
