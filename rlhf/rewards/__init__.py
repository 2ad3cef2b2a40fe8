"""(prompt, answer) -> number: the task's verifier, a reward model, the user's function or server, or a weighted sum.

A reward that cannot be had is None, never 0. Training a reward model is stages/reward_model.py. Only model.py and
pretrained.py need torch, and are imported where there is a reward model.
"""

from rlhf.rewards.failures import usable
from rlhf.rewards.function import FunctionReward
from rlhf.rewards.http import HttpReward
from rlhf.rewards.make import check_reward, combine, given_rewards
from rlhf.rewards.samples import rewarded
from rlhf.rewards.verifier import VerifierReward
from rlhf.rewards.weighted_sum import WeightedSum

__all__ = [
    "FunctionReward",
    "HttpReward",
    "VerifierReward",
    "WeightedSum",
    "check_reward",
    "combine",
    "given_rewards",
    "rewarded",
    "usable",
]
