"""What a configuration says where a Python program gives objects: `given` in each group that has one."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from typing import Any, TypeVar

from rlhf.config import (
    EnvironmentTaskConfig,
    GivenModelConfig,
    GivenRewardConfig,
    GivenTaskConfig,
    JsonlLoggerConfig,
    RewardConfig,
    RewardPart,
    RunConfig,
    SumRewardConfig,
    TaskConfig,
)
from rlhf.preflight.objects import Objects
from transfer.agreement.shown import shown

Function = Callable[..., Any]
Config = TypeVar("Config")
PLACES = ("path",)  # of rows that others take the place of


def named(rewards: Any) -> tuple[dict[str, Function], list[float] | None]:
    """Each function by a name like module:name, and their weights, if they have any; ValueError if one is none."""
    if rewards is None:
        return {}, None
    functions: dict[str, Function] = {}
    for each in [rewards] if callable(rewards) else _listed(rewards):
        if not callable(each):
            raise ValueError(f"rewards= must be functions (got {shown(each)}): others are chosen by reward=...")
        if hasattr(each, "parameters") and hasattr(each, "state_dict"):
            raise ValueError(f"rewards= must be functions: a {type(each).__name__} is reward=model reward.path=FOLDER")
        name = first = _name_of(each)
        number = 1
        while name in functions:
            number += 1
            name = f"{first}_{number}"
        functions[name] = each
    return functions, list(rewards.values()) if isinstance(rewards, Mapping) else None


def _listed(rewards: Any) -> list[Any]:
    if isinstance(rewards, str) or not isinstance(rewards, (Sequence, Mapping)) or not rewards:
        raise ValueError(f"rewards= must be a function, a list of them or a dict with weights (got {shown(rewards)})")
    return list(rewards)


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return f"{getattr(function, '__module__', None) or 'program'}:{re.sub(r'[^0-9A-Za-z_]', '', name) or 'function'}"


def fitted(config: RunConfig, objects: Objects, listed: bool, weights: list[float] | None) -> RunConfig:
    """The configuration with the objects' choices, and with metrics as a file, which a result is read from."""
    changed: dict[str, Any] = {"logger": {"jsonl": JsonlLoggerConfig(), **config.logger}}
    if objects.held_out is not None and objects.data is None:
        raise ValueError("held_out= are rows beside those of data=: give data=, too, or set task.held_out_path")
    if objects.data is not None:
        changed["task"] = _asked(config.task)
    if objects.policy is not None:
        from rlhf.models.given import check_policy

        changed["model"] = like(GivenModelConfig, config.model, dtype=check_policy(objects.policy))
    if objects.rewards:
        names = list(objects.rewards) if listed else next(iter(objects.rewards))
        given = {"function": names, **({} if weights is None else {"weights": weights})}
        changed["reward"] = _rewarded(config.reward, given)
    return replace(config, **changed)


def _asked(config: TaskConfig) -> TaskConfig:
    """The rows as the task, or as those of an environment."""
    if isinstance(config, EnvironmentTaskConfig):
        return replace(config, path=GivenTaskConfig().path)
    return like(GivenTaskConfig, config, leave=PLACES)


def _rewarded(config: RewardConfig, given: dict[str, Any]) -> RewardConfig:
    """The functions as the reward, or as those parts of a sum that are `given`."""
    if not isinstance(config, SumRewardConfig):
        return like(GivenRewardConfig, config, **given)
    parts = {
        name: RewardPart(replace(part.reward, **given), part.weight)
        for name, part in config.parts.items()
        if isinstance(part.reward, GivenRewardConfig)
    }
    if not parts:
        return GivenRewardConfig(max_failed=config.max_failed, **given)
    return replace(config, parts={**config.parts, **parts})


def like(kind: type[Config], config: Any, leave: Sequence[str] = (), **values: Any) -> Config:
    """One of this kind with what somebody has changed of the dials that both have."""
    if isinstance(config, kind):
        return replace(config, **values)  # type: ignore[type-var]
    known = {each.name for each in fields(kind)} - set(leave)  # type: ignore[arg-type]
    told = {each.name: getattr(config, each.name) for each in fields(config) if each.name in known}
    changed = {
        each.name: told[each.name] for each in fields(config) if each.name in told and told[each.name] != _default(each)
    }
    return kind(**{**changed, **values})


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
