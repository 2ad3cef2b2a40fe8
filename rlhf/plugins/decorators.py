"""How a part is registered: a decorator a kind, around what makes the part.

    @task("mine", MineConfig)
    def mine(config: MineConfig, seed: int) -> RawTask: ...

In place of a decorated function, `make="package.module:function"` names one that is imported when it is first needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from rlhf.plugins import registry
from rlhf.plugins.part import COMPARES, CRITIC, SERVICE, TOKENS, Maker, Part

F = TypeVar("F", bound=Callable[..., Any])


def task(name: str, config: type, *, make: str | None = None) -> Callable[[F], F]:
    """`task=NAME`: (config, seed) -> RawTask (rlhf/tasks/raw.py), the same for the same seed."""
    return _registered(Part("task", name, config, make))


def environment(name: str, config: type, *, make: str | None = None) -> Callable[[F], F]:
    """`task/environment=NAME`: (config) -> Replies (rlhf/tasks/raw.py), which answer the policy in a conversation."""
    return _registered(Part("environment", name, config, make))


def reward(name: str, config: type, *, make: str | None = None, check: Maker | None = None) -> Callable[[F], F]:
    """`reward=NAME`, or a part of reward=sum: (config, given) -> (prompts, answers) -> numbers or None.

    `given.task` is the task (rlhf/rewards/make.py). `check(config, task)` raises ValueError where the two do not fit.
    """
    return _registered(Part("reward", name, config, make, check))


def loss(name: str, config: type | None = None, *, make: str | None = None) -> Callable[[F], F]:
    """`algo.loss=NAME`: (algo, logprobs_BT, old_BT, advantages_BT, mask_BT) -> (loss_BT, log_ratio_BT).

    With a dataclass, which builds on AlgoConfig, `algo=NAME` is a choice with its dials.
    """
    return _registered(Part("loss", name, config, make))


def advantage(
    name: str,
    config: type | None = None,
    *,
    make: str | None = None,
    compares: bool = True,
    tokens: bool = False,
    critic: bool = False,
) -> Callable[[F], F]:
    """`algo.advantage=NAME`: (algo, rewards_Pn) -> advantages_Pn; a reward of NaN is none.

    `compares`: one sample of a prompt alone teaches nothing. `tokens`: (algo, signal) -> (advantages_BT, returns_BT or
    None) instead (rlhf/learning/estimates.py); with `critic` there are a critic's values, and it learns the returns.
    """
    told = {COMPARES: compares, TOKENS: tokens, CRITIC: critic}
    return _registered(Part("advantage", name, config, make, traits=_those(told)))


def optimizer(name: str, config: type, *, make: str | None = None) -> Callable[[F], F]:
    """`optim=NAME`: (config, named parameters, lr) -> torch.optim.Optimizer over them."""
    return _registered(Part("optimizer", name, config, make))


def logger(
    name: str,
    config: type,
    *,
    make: str | None = None,
    service: bool = False,
    writes: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[F], F]:
    """`logger=[..., NAME]`: (config, given) -> an object with log(step, metrics) and close().

    `given` has run, folder, ... (rlhf/monitor/loggers.py). A `service` works in a thread of its own. `writes`: what it
    leaves in the run's folder, each file with what it is, for mode=check to list.
    """
    return _registered(Part("logger", name, config, make, traits=_those({SERVICE: service}), writes=writes))


def _those(told: dict[str, bool]) -> frozenset[str]:
    return frozenset(name for name, holds in told.items() if holds)


def _registered(part: Part) -> Callable[[F], F]:
    """Register a part whose maker is named, or one whose maker is decorated."""
    if part.make is not None:
        module = sys._getframe(2).f_globals["__name__"]  # that calls `task`, `loss`, ...
        registry.register(_by(part, f"{module}:{str(part.make).rpartition(':')[2]}"))
        return lambda function: function

    def decorate(function: F) -> F:
        module = sys._getframe(1).f_globals["__name__"]  # that decorates; the function may be another's
        where = f"{module}:{getattr(function, '__qualname__', type(function).__name__)}"
        registry.register(_by(part, where, function))
        return function

    return decorate


def _by(part: Part, where: str, make: Maker | None = None) -> Part:
    return replace(part, make=make or part.make, where=where)
