"""An environment that several threads ask: one after the other, since it need not know of threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from rlhf.types import Environment, Prompt


class InTurn:
    """As `environment`, a call at a time."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._asked = threading.Lock()

    @property
    def turns(self) -> int:
        """As the environment's."""
        return self._environment.turns

    @property
    def longest_reply(self) -> int:
        """As the environment's."""
        return self._environment.longest_reply

    def reply(self, prompt: Prompt, answers: Sequence[str]) -> str | None:
        """As the environment's."""
        with self._asked:
            return self._environment.reply(prompt, answers)

    def encode(self, reply: str) -> list[int]:
        """As the environment's."""
        with self._asked:
            return self._environment.encode(reply)
