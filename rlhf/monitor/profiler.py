"""`profile.steps=[3,4]`: a torch.profiler trace of each of these steps, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Profiler:
    """Traces the trainer's process from a step's first phase to its end, into `profile/step-N.json`."""

    def __init__(self, steps: Sequence[int], folder: Path) -> None:
        self.steps, self.folder = frozenset(steps), folder
        self._running: Any = None

    def begin(self, step: int) -> None:
        """A phase of this step begins."""
        if step not in self.steps or self._running is not None:
            return
        from torch.profiler import profile

        self._running = profile(record_shapes=True)
        self._running.start()

    def end(self, step: int) -> None:
        """The step is done."""
        if self._running is None:
            return
        self._running.stop()
        self.folder.mkdir(exist_ok=True)
        self._running.export_chrome_trace(str(self.folder / f"step-{step}.json"))
        self._running = None
