"""Modules that are called as a function of their name: `rlhf.train(...)` works, whoever has imported the module."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class Called(ModuleType):
    """A module whose `CALLED` names a function, `package.module:name`, that a call of the module calls."""

    CALLED: str

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        module, _, name = self.CALLED.partition(":")
        return getattr(importlib.import_module(module), name)(*arguments, **named)


def let_be_called(module: str) -> None:
    """For the last line of such a module; where it is a program's main one, nobody calls it."""
    sys.modules[module].__class__ = Called
