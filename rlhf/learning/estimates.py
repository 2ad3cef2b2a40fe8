"""The advantages that a configuration can name, from what a step's samples are worth (advantages.py has the formulas).

Shapes: P prompts, n samples a prompt, B = P*n rows, T response tokens. Those of an answer are (algo, rewards_Pn) ->
advantages_Pn; those of a token are (algo, signal) -> (advantages_BT, returns_BT, which is None without a critic).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.config.algo import AlgoConfig
from rlhf.learning import advantages as adv
from rlhf.plugins.part import TOKENS
from rlhf.plugins.registry import find
from rlhf.shell.ending import RunError


@dataclass(frozen=True, slots=True)
class Signal:
    """What a step's samples are worth; a reward of NaN marks a sample to leave out."""

    rewards_B: Tensor
    penalty_BT: Tensor  # what a token loses of it: the KL, where that is in the reward
    mask_BT: Tensor  # 1 on sampled tokens
    prompts: int  # P
    values_BT: Tensor | None = None  # the critic's
    sample_of_B: Sequence[int] | None = None  # of rows behind the P*n samples, that of which they are; None: no others

    @property
    def rewards_Pn(self) -> Tensor:
        """Of each answer, less its tokens' penalties."""
        penalties_B = self.penalty_BT.sum(dim=1)
        if self.sample_of_B is None:
            return (self.rewards_B - penalties_B).view(self.prompts, -1)
        samples = max(self.sample_of_B) + 1
        of_samples = torch.zeros(samples, dtype=penalties_B.dtype, device=penalties_B.device)
        of_samples = of_samples.index_add(0, self._samples, penalties_B)
        return (self.rewards_B[:samples] - of_samples).view(self.prompts, -1)

    @property
    def rho_BT(self) -> Tensor:
        """Of each token: its penalty, and the answer's reward on the last."""
        return adv.token_rewards(self.rewards_B.nan_to_num(), self.penalty_BT, self.mask_BT)

    def over_tokens(self, advantages_Pn: Tensor) -> Tensor:
        """Each answer's advantage on its tokens [B, T], 0 on answers that are left out."""
        advantages = advantages_Pn.flatten().nan_to_num()
        return (advantages if self.sample_of_B is None else advantages[self._samples])[:, None] * self.mask_BT

    @property
    def _samples(self) -> Tensor:
        return torch.tensor(self.sample_of_B, device=self.mask_BT.device)


def estimate(algo: AlgoConfig, signal: Signal) -> tuple[Tensor, Tensor | None]:
    """The advantages [B, T] that `algo.advantage` names, and returns [B, T] for a critic."""
    part = find("advantage", algo.advantage)
    if TOKENS in part.traits:
        if signal.sample_of_B is not None and len(signal.sample_of_B) > max(signal.sample_of_B) + 1:
            raise RunError(
                f"algo={algo.name} follows rewards from token to token, and the context of a sample was rewritten, so "
                "that it is several rows: choose an algo that compares whole samples (grpo, rloo, dapo, ...)"
            )
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
