"""The advantages that a configuration can name, from what a step's samples are worth (advantages.py has the formulas).

Shapes: P prompts, n samples a prompt, B = P*n rows, T response tokens. Those of an answer are (algo, rewards_Pn) ->
advantages_Pn; those of a token are (algo, signal) -> (advantages_BT, returns_BT, which is None without a critic).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf.config.algo import AlgoConfig
from rlhf.learning import advantages as adv
from rlhf.plugins.part import TOKENS
from rlhf.plugins.registry import find


@dataclass(frozen=True, slots=True)
class Signal:
    """What a step's samples are worth; a reward of NaN marks a sample to leave out."""

    rewards_B: Tensor
    penalty_BT: Tensor  # what a token loses of it: the KL, where that is in the reward
    mask_BT: Tensor  # 1 on sampled tokens
    prompts: int  # P
    values_BT: Tensor | None = None  # the critic's

    @property
    def rewards_Pn(self) -> Tensor:
        """Of each answer, less its tokens' penalties."""
        return (self.rewards_B - self.penalty_BT.sum(dim=1)).view(self.prompts, -1)

    @property
    def rho_BT(self) -> Tensor:
        """Of each token: its penalty, and the answer's reward on the last."""
        return adv.token_rewards(self.rewards_B.nan_to_num(), self.penalty_BT, self.mask_BT)

    def over_tokens(self, advantages_Pn: Tensor) -> Tensor:
        """Each answer's advantage on its tokens [B, T], 0 on answers that are left out."""
        return advantages_Pn.flatten().nan_to_num()[:, None] * self.mask_BT


def estimate(algo: AlgoConfig, signal: Signal) -> tuple[Tensor, Tensor | None]:
    """The advantages [B, T] that `algo.advantage` names, and returns [B, T] for a critic."""
    part = find("advantage", algo.advantage)
    if TOKENS in part.traits:
        advantages_BT, returns_BT = part.maker()(algo, signal)
        return advantages_BT, returns_BT
    return signal.over_tokens(part.maker()(algo, signal.rewards_Pn)), None


def group_norm(algo: AlgoConfig, rewards_Pn: Tensor) -> Tensor:
    """GRPO's."""
    return adv.group_norm(rewards_Pn)


def group_mean(algo: AlgoConfig, rewards_Pn: Tensor) -> Tensor:
    """Dr.GRPO's."""
    return adv.group_mean(rewards_Pn)


def leave_one_out(algo: AlgoConfig, rewards_Pn: Tensor) -> Tensor:
    """RLOO's."""
    return adv.leave_one_out(rewards_Pn)


def reinforce_pp(algo: AlgoConfig, signal: Signal) -> tuple[Tensor, None]:
    """REINFORCE++'s."""
    return adv.whiten(adv.reward_to_go(signal.rho_BT, signal.mask_BT, algo.gamma), signal.mask_BT), None


def reinforce_pp_baseline(algo: AlgoConfig, signal: Signal) -> tuple[Tensor, None]:
    """REINFORCE++'s with the group's mean as baseline."""
    return adv.whiten(signal.over_tokens(adv.group_mean(signal.rewards_Pn)), signal.mask_BT), None


def gae(algo: AlgoConfig, signal: Signal) -> tuple[Tensor, Tensor]:
    """PPO's."""
    assert signal.values_BT is not None
    raw_BT, returns_BT = adv.gae(signal.rho_BT, signal.values_BT, signal.mask_BT, algo.gamma, algo.lam)
    return adv.whiten(raw_BT, signal.mask_BT), returns_BT
