"""The user's function by its name, here or in a process of its own."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.shell.apart import Apart
from rlhf.shell.own_modules import import_own, looked_in

CALLED = f"{__name__}:called"


class OwnFunction:
    """The function in a process of its own, which is killed at the deadline."""

    def __init__(self, name: str) -> None:
        self._name, self._apart = name, Apart(CALLED)

    def __call__(self, given: Sequence[Any], named: Mapping[str, Any], timeout_s: float) -> Any:
        """What it returns, of numbers and None; RaisedError or LateError where it returns nothing."""
        return self._apart(self._name, list(given), dict(named), timeout_s=timeout_s)

    def close(self) -> None:
        """End the process; the next call starts another."""
        self._apart.close()


def imported(name: str) -> Callable[..., Any]:
    """The function, or an object of the class, that `package.module:name` names; ValueError if there is none."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(import_own(module), attribute)
        if inspect.isclass(function) and "__call__" in dir(function):
            function = function()
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"reward.function={name} cannot be imported, {looked_in()}: {type(error).__name__}: {error}"
        ) from error
    if not callable(function):
        raise ValueError(f"reward.function={name} must name a function (got {type(function).__name__})")
    return function


def called(name: str, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """In its process: the function's answer, whose arrays and tensors become numbers."""
    answer = _function(name)(*given, **named)
    if inspect.isawaitable(answer):
        answer = _loop().run_until_complete(_awaited(answer))
    listed = answer.tolist() if hasattr(answer, "tolist") else answer
    return [_plain(value) for value in listed] if isinstance(listed, (list, tuple)) else listed


def _plain(value: Any) -> Any:
    try:
        return value.item() if hasattr(value, "item") else value
    except (RuntimeError, TypeError, ValueError):
        return repr(value)  # several numbers are none


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    return imported(name)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for all calls, as clients that a function keeps belong to the loop in which they were made."""
    return asyncio.new_event_loop()


async def _awaited(answer: Any) -> Any:
    return await answer
