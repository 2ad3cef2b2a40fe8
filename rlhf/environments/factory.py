"""What a user's class is: whose tools are its public methods, or that is played by reset and step; and tools beside it.

The class is imported here to look at it; its instances are made in another process (host.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.plugins.part import imported
from rlhf.shell.own_modules import import_own
from transfer.agreement.shown import told

OWN = ("reset", "step", "get_reward", "close", "rows")  # methods that are no tools


@dataclass(frozen=True, slots=True)
class Factory:
    """A class, by `package.module:Class`, and functions that are tools without state; or functions alone."""

    named: str | None
    functions: Sequence[str]
    made: type | None
    tools: Mapping[str, Callable[..., Any]]

    @classmethod
    def of(cls, named: str | None, functions: Sequence[str]) -> Factory:
        """ValueError says what is wrong with the class, or with a function."""
        made = None if named is None else _imported("task.factory", named)
        if made is not None and not inspect.isclass(made):
            raise ValueError(f"task.factory must name a class, like games.maze:Maze (got {named}, which is none)")
        tools = {} if made is None else _methods(made)
        plays = callable(getattr(made, "step", None))
        if plays:
            tools = {}
        for each in functions:
            function = _imported("task.tools", each)
            name = getattr(function, "__name__", each)
            if not callable(function):
                raise ValueError(f"task.tools: {each} is no function")
            if name in tools:
                raise ValueError(f"task.tools: {each} has the name of another tool, {name}: give it another")
            tools[name] = function
        if plays and tools:
            raise ValueError("task.tools is for environments whose methods are tools, and this one has a method step")
        if not tools and not plays:
            raise ValueError(
                f"task.factory: {named} has neither a method step nor a public method that could be a tool"
                if named
                else "task=environment needs task.factory=package.module:Class, task.tools=[package.module:function]"
            )
        factory = cls(named, tuple(functions), made, tools)
        for name, tool in tools.items():
            _check_tool(name, tool)
        if plays:
            factory.check_played()
        return factory

    @property
    def plays(self) -> bool:
        """Whether it is played by reset and step."""
        return callable(getattr(self.made, "step", None))

    def check_played(self) -> None:
        """ValueError unless reset and step can be called."""
        if not self.has("reset"):
            raise ValueError(f"task.factory: {self.named} has a method step, and none that is called reset")
        if self.action is None:
            raise ValueError(f"task.factory: step() of {self.named} must take the action: step(self, action)")

    @property
    def action(self) -> str | None:
        """What `step` calls the action; None if it takes none."""
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        taken = list(inspect.signature(getattr(self.made, "step")).parameters.values())[1:]  # noqa: B009
        names = [parameter.name for parameter in taken if parameter.kind in named]
        return "action" if "action" in names else next(iter(names), None)

    def has(self, method: str) -> bool:
        """Whether there is such a method, beside tools."""
        return callable(getattr(self.made, method, None))

    def rows(self) -> Iterable[Mapping[str, Any]] | None:
        """The rows that the class has of its own; None if it has none."""
        rows = getattr(self.made, "rows", None)
        if rows is None:
            return None
        try:
            return list(rows())
        except Exception as error:  # whatever the user's code raises
            raise ValueError(f"task.factory: rows() of {self.named} fails: {told(error)}") from error

    def given(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Of a row, what `reset` takes: all of it, or what its parameters name."""
        taken = inspect.signature(getattr(self.made, "reset")).parameters  # noqa: B009
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
            return dict(row)
        return {name: row[name] for name in taken if name in row}

    def schemas(self) -> list[dict[str, Any]]:
        """The tools as chat templates have them, by transformers' get_json_schema; ValueError says what is missing."""
        from transformers.utils.chat_template_utils import get_json_schema

        schemas = []
        for name, tool in self.tools.items():
            try:
                schemas.append(get_json_schema(tool))
            except Exception as error:  # of its own kinds, for a parameter without a type or a description
                raise ValueError(f"tool {name}: {' '.join(str(error).split())}") from None
        return schemas


def instance_maker(named: str | None, functions: Sequence[str]) -> Callable[[], Any]:
    """What makes instances, in the process that holds them: with the functions as methods that know no instance."""
    own = {function.__name__: function for function in map(imported, functions)}
    make = _Bare if named is None else imported(named)
    return (lambda: Beside(make(), own)) if own else make


class _Bare:
    """Nothing but its tools."""


class Beside:
    """An instance, and functions beside its methods."""

    def __init__(self, instance: Any, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._instance, self._functions = instance, functions

    def __getattr__(self, name: str) -> Any:
        return self._functions[name] if name in self._functions else getattr(self._instance, name)


def _imported(key: str, named: str) -> Any:
    module, _, name = named.partition(":")
    if not module or not name:
        raise ValueError(f"{key} must be like package.module:name (got {named!r})")
    try:
        return getattr(import_own(module), name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"{key}: cannot import {named}: {told(error)}") from error


def _methods(made: type) -> dict[str, Callable[..., Any]]:
    """Its public methods, in the order in which they are written, those of its bases first."""
    found: dict[str, Callable[..., Any]] = {}
    for each in reversed(made.__mro__[:-1]):
        for name, value in vars(each).items():
            if inspect.isfunction(value) and not name.startswith("_") and name not in OWN:
                found[name] = value
    return found


def _check_tool(name: str, tool: Callable[..., Any]) -> None:
    """ValueError unless a policy can be told what it is for."""
    if not inspect.getdoc(tool):
        raise ValueError(f"tool {name} has no docstring: say in it what it is for, and its arguments (Args:)")
    parameters = [each for each in inspect.signature(tool).parameters.values() if each.name != "self"]
    for parameter in parameters:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise ValueError(f"tool {name} takes *{parameter.name}: name its parameters")
        if parameter.annotation is inspect.Parameter.empty:
            raise ValueError(f"tool {name}: its parameter {parameter.name} has no type")
