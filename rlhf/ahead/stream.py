"""The prompts of a run as one stream: those of its steps in their order, and on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

from rlhf.learning.batches import batches
from rlhf.rollout.sampling import seed_of
from rlhf.types import Prompt


class Stream:
    """Prompt `index` of the stream and its seed: what it has where a step's samples are drawn when the step begins."""

    def __init__(self, prompts: Sequence[Prompt], size: int, seed: int) -> None:
        """`size`: prompts a step."""
        self._prompts, self._seed = prompts, seed
        self.size = min(size, len(prompts))
        self._batches = iter(batches(len(prompts), size, sys.maxsize, seed))
        self._rows: list[int] = []
        self._guard = threading.Lock()

    def __getitem__(self, index: int) -> tuple[Prompt, int]:
        """The prompt, and its seed."""
        with self._guard:
            while len(self._rows) <= index:
                self._rows += next(self._batches)
        step, place = index // self.size + 1, index % self.size
        return self._prompts[self._rows[index]], seed_of(self._seed + step, place)

    @property
    def prompts(self) -> Sequence[Prompt]:
        """All that there are."""
        return self._prompts
