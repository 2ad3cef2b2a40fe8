"""One worker of a run, from its start to its end, whatever it is: a process, an actor, or one that runs elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transfer import Sender

Connect = Callable[[float], "Sender"]  # waits until the worker is up, to this deadline; an error names it


def at_once() -> bool:
    """Of a worker that is there already."""
    return True


@dataclass(eq=False, slots=True)
class Begun:
    """A worker that has been started, and comes up meanwhile; it ends with `stack`."""

    index: int  # by which logs and metrics call it
    connect: Connect
    is_up: Callable[[], bool] = at_once  # whether `connect` need not wait: it answers, or is dead
    stack: ExitStack = field(default_factory=ExitStack)
    sender: Sender | None = None  # once it is up


Begin = Callable[[int], Begun]  # starts the worker of this number; ValueError or RunError: why there is none
