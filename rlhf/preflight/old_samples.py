"""What a user should know of an objective that learns from samples of much older weights, before it does."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.config import RunConfig
from rlhf.config.algo import AlgoConfig

UNCLIPPED = ("reinforce",)  # losses that bound nothing; of others' own ones nobody knows
LOOSE = 10.0  # algo.correction_high, above which it is hardly a bound


def hardly_bounded(config: RunConfig) -> Iterator[str]:
    """A line for each way in which a few old tokens, or a step's updates, may move the policy far.

    A loss clips the policy against itself at the step's beginning, which in the first update is the policy: what
    older weights have sampled is bounded by the correction alone.
    """
    algo, lag = config.algo, config.rollout.ahead.most_lag(config.prompts_per_step)
    if lag <= 1 or not isinstance(algo, AlgoConfig):
        return
    if algo.correction_high > LOOSE:
        yield (
            f"warning: samples are up to {lag} versions old (rollout.ahead.lag), and algo.correction_high="
            f"{algo.correction_high:g} hardly bounds what one of them weighs: set it to {LOOSE:g} at most, 2 by default"
        )
    if algo.loss in UNCLIPPED and config.updates_per_step > 1:
        yield (
            f"warning: samples are up to {lag} versions old (rollout.ahead.lag), and algo.loss={algo.loss} does not "
            f"bound how far {config.updates_per_step} updates on them move the policy: choose algo.loss=clip, or set "
            "updates_per_step=1"
        )
