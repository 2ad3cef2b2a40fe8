"""What a part of a run is: a dataclass, the dials by which it is chosen and told, and a maker.

A maker may be named, as `package.module:function`: it is imported when something is first made.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from transfer.agreement.shown import told

OURS = "rlhf"  # the package whose parts are always there
TOKENS = "tokens"  # an advantage of each token, from Signal; else of each answer, from the rewards of groups
COMPARES = "compares"  # an advantage that compares samples of one prompt: one sample alone teaches nothing
CRITIC = "critic"  # an advantage that needs a critic's values
SERVICE = "service"  # a logger that works in a thread of its own, and that a check does not start

Maker = Callable[..., Any]


class PartError(ValueError):
    """A part cannot be had: the message says which, of whom, and what to change."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What parts of one kind have in common."""

    group: str  # of Hydra's choices
    entry_points: str
    base: str  # module:class on which their dataclasses build
    dial: str = ""  # the key that names one, where it is chosen without a dataclass, too

    def chosen(self, name: str) -> str:
        """How a part of this kind is chosen on the command line."""
        return f"{self.dial or self.group}={name}"


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "task": Kind("task", "rlhf.tasks", "rlhf.config:TaskConfig"),
        "environment": Kind("task/environment", "rlhf.environments", "rlhf.config:EnvironmentConfig"),
        "reward": Kind("reward", "rlhf.rewards", "rlhf.config:RewardConfig"),
        "loss": Kind("algo", "rlhf.losses", "rlhf.config.algo:AlgoConfig", dial="algo.loss"),
        "advantage": Kind("algo", "rlhf.advantages", "rlhf.config.algo:AlgoConfig", dial="algo.advantage"),
        "optimizer": Kind("optim", "rlhf.optimizers", "rlhf.config:OptimConfig"),
        "logger": Kind("logger", "rlhf.loggers", "rlhf.config:LoggerConfig"),
    }
)


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that a run can be made of."""

    kind: str
    name: str
    config: type | None = None  # the dataclass with its dials
    make: Maker | str | None = None  # None: there is nothing to make
    check: Maker | str | None = None  # asked before anything is trained
    traits: frozenset[str] = frozenset()
    where: str = OURS  # who registers it
    writes: Mapping[str, str] = field(default_factory=dict, hash=False)  # of a logger: files, with what each is

    @property
    def chosen(self) -> str:
        """How it is chosen on the command line."""
        return KINDS[self.kind].chosen(self.name)

    @property
    def ours(self) -> bool:
        """Whether it is one of this package's own."""
        return self.where == OURS

    def maker(self) -> Maker:
        """What makes it; PartError where it cannot be imported."""
        return self._imported("maker", self.make)

    def checker(self) -> Maker | None:
        """What is asked before anything is trained, if there is something to ask."""
        return None if self.check is None else self._imported("check", self.check)

    def _imported(self, what: str, named: Maker | str | None) -> Maker:
        try:
            function = imported(named) if isinstance(named, str) else named
        except Exception as error:  # whatever the module raises
            raise PartError(f"{self.chosen}: its {what} {named} cannot be imported: {told(error)}") from error
        if not callable(function):
            raise PartError(f"{self.chosen}: its {what} {named} is no function")
        return function


@functools.cache
def imported(named: str) -> Any:
    """What `package.module:name` names; raises whatever its module raises."""
    module, _, name = named.partition(":")
    return getattr(importlib.import_module(module), name)
