"""Rotary factors that change with the length of a row (longrope): nobody computes a row that crosses the change.

Where a row grows beyond `original_max_position_embeddings`, transformers takes the long factors in place of the short
ones, and for all rows of a batch. What a worker has cached by then has the short ones, and the learner computes the
whole row with the long ones, so that log-probs of the same tokens differ. vLLM chooses once, by its longest row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf.config import EvaluationConfig, RunConfig, VllmRolloutConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def change_of(policy: PreTrainedModel) -> int | None:
    """The tokens of the longest row that has the short factors; None where factors are the same for all rows."""
    config: Any = policy.config.get_text_config()
    told = getattr(config, "rope_parameters", None) or {}
    kinds = [told, *(each for each in told.values() if isinstance(each, dict))]  # some have one by kind of layer
    long = [each for each in kinds if each.get("rope_type") == "longrope"]
    own = getattr(config, "original_max_position_embeddings", None)
    limits = [each.get("original_max_position_embeddings") or own for each in long]
    return min((limit for limit in limits if limit), default=None)


def check_rotary(config: RunConfig | EvaluationConfig, change: int) -> None:
    """ValueError where vLLM would sample all rows with the long factors, since the learner has the short ones."""
    if not isinstance(config.rollout, VllmRolloutConfig):
        return
    longest = config.rollout.engine_args.get("max_model_len")
    if not isinstance(longest, int) or longest > change:
        raise ValueError(
            f"its rotary factors change beyond {change} tokens (longrope), and vLLM takes the long ones for "
            f"every row unless rollout.engine_args.max_model_len is at most {change} (got {longest}): set it so"
        )
