"""The parts that a run can be made of, by kind and name: ours and others' in one table, which imports nothing heavy.

A part is a dataclass, the dials by which it is chosen and told, and a maker. A maker may be named, as
`package.module:function`: it is imported when something is first made. Those of installed packages (found.py) are
known by name alone until they are chosen.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from types import MappingProxyType
from typing import Any

from transfer.agreement.shown import one_line, shown

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


_parts: dict[tuple[str, str], Part] = {}


def register(part: Part) -> None:
    """Let a part be chosen by its name; PartError where it is not made as parts are, or its name is taken."""
    if not part.ours:
        _builtin()
    _check_made(part)
    there = _parts.get((part.kind, part.name))
    owner = there.where if there is not None else _owner(part)
    if owner not in (None, part.where):
        raise PartError(f"{part.where} registers {part.chosen}, which {owner} has: give it another name")
    twice = [p for p in _parts.values() if p.config is part.config is not None and p.name != part.name]
    if twice:
        raise PartError(
            f"{part.where} registers {part.chosen} with the dataclass of {twice[0].chosen}: give it one of its own"
        )
    _parts[part.kind, part.name] = part


def _check_made(part: Part) -> None:
    kind, said = KINDS[part.kind], f"{part.where} registers {part.chosen}"
    if not part.name.isidentifier():
        raise PartError(f"{said}: a name must be letters, digits and _ (got {shown(part.name)})")
    if part.config is None and not kind.dial:
        raise PartError(f"{said} without a dataclass: give it one that builds on {kind.base.replace(':', '.')}")
    if part.config is None:
        return
    base = imported(kind.base)
    if not (isinstance(part.config, type) and is_dataclass(part.config)):
        raise PartError(f"{said} with {shown(part.config)}, which is no dataclass: mark it @dataclass(slots=True, ...)")
    if not (isinstance(base, type) and issubclass(part.config, base)):
        raise PartError(f"{said} with {part.config.__name__}, which must build on {kind.base.replace(':', '.')}")
    if part.config.__dictoffset__:  # it would take keys that it has not
        raise PartError(f"{said} with {part.config.__name__}: mark it @dataclass(slots=True, kw_only=True)")


def names(kind: str) -> list[str]:
    """What can be chosen of a kind: ours, then others'."""
    return list(dict.fromkeys([*(name for k, name in _loaded() if k == kind), *_offered(kind)]))


def find(kind: str, name: str) -> Part:
    """The part of this name, imported if it is a package's; PartError lists what there is."""
    if part := _loaded().get((kind, name)):
        return part
    if name in _offered(kind):
        from rlhf.plugins.found import load

        return load(kind, name)
    key = KINDS[kind].chosen("").rstrip("=")
    raise PartError(f"{key} must be one of {', '.join(names(kind))} (got {shown(name)})")


def find_loaded(kind: str, name: str) -> Part | None:
    """The part of this name, if nothing more need be imported for it."""
    return _loaded().get((kind, name))


def part_of(config: Any) -> Part:
    """The part that this configuration chooses."""
    found = _by_config(type(config))
    if found is None:  # it has come from another process, and its package is not loaded in this one
        for kind in KINDS:
            for name in _offered(kind):
                if found is None:
                    with suppress(PartError):  # of another package
                        find(kind, name)
                    found = _by_config(type(config))
    assert found is not None, type(config)
    return found


def loaded() -> list[Part]:
    """Every part whose dataclass is known without importing anything more."""
    return list(_loaded().values())


def made(config: Any, *arguments: Any) -> Any:
    """What the part makes that this configuration chooses."""
    return part_of(config).maker()(config, *arguments)


def told(error: BaseException) -> str:
    """An exception of others' code in one line."""
    return f"{type(error).__name__}: {one_line(str(error), 300)}"


def _by_config(config: type) -> Part | None:
    return next((part for part in _loaded().values() if part.config is config), None)


def _loaded() -> Mapping[tuple[str, str], Part]:
    _builtin()
    return _parts


@functools.cache
def _builtin() -> None:
    importlib.import_module("rlhf.plugins.builtin")


def _offered(kind: str) -> list[str]:
    """Names of installed packages' parts, which are imported when they are chosen."""
    from rlhf.plugins.found import offered

    return offered(kind)


def _owner(part: Part) -> str | None:
    """Who else offers a part of that name."""
    from rlhf.plugins.found import owner

    return None if part.ours else owner(part)


@functools.cache
def imported(named: str) -> Any:
    """What `package.module:name` names; raises whatever its module raises."""
    module, _, name = named.partition(":")
    return getattr(importlib.import_module(module), name)
