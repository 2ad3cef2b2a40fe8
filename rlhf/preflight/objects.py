"""Objects of a Python program, in place of what a run would have made of its configuration; and which it asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.config import EvaluationConfig, GivenModelConfig, GivenRewardConfig, RunConfig


@dataclass(frozen=True, slots=True)
class Objects:
    """What a program gives a run; None: what the configuration says."""

    policy: Any = None
    tokenizer: Any = None
    data: Any = None
    held_out: Any = None
    rewards: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # by their names in reward.function

    @property
    def rows(self) -> tuple[Any, ...]:
        """What task=given is made of."""
        return () if self.data is None else (self.data, self.held_out)

    def named(self) -> dict[str, Any]:
        """Which there are, for a run's folder: what kind each is, and rewards by their names."""
        there = {name: getattr(self, name) for name in ("policy", "tokenizer", "data", "held_out")}
        kinds = {name: type(given).__name__ for name, given in there.items() if given is not None}
        return {**kinds, "rewards": list(self.rewards)} if self.rewards else dict(kinds)


NOTHING = Objects()


def check_given(config: RunConfig | EvaluationConfig, objects: Objects) -> None:
    """ValueError where the configuration asks for an object that nobody gives; read_task says so of rows."""
    if isinstance(config.model, GivenModelConfig) and objects.policy is None:
        raise ValueError(
            "model=given takes the policy from a Python program, rlhf.train(config, policy=model): give it there, or "
            "choose model=hf model.path=FOLDER"
        )
    rewards = config.reward.weighted().values() if isinstance(config, RunConfig) else ()
    if any(isinstance(part.reward, GivenRewardConfig) for part in rewards) and not objects.rewards:
        raise ValueError(
            "reward=given takes its functions from a Python program, rlhf.train(config, rewards=function): give them "
            "there, or choose reward=function reward.function=package.module:name"
        )
