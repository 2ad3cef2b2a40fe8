"""`profile.steps=[3,4]`: torch.profiler traces of each of these steps, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.monitor.traces import FOLDER, profiler, write
from transfer.agreement.shown import one_line
from transfer.agreement.wire import RemoteError

if TYPE_CHECKING:
    from transfer import Sender

WRITE_S = 300.0  # how long a worker may take to write its trace


class Profiler:
    """Traces the trainer and its workers from a step's first phase to its end.

    The trainer's trace is `profile/step-N.json.gz`; each of `workers` writes `profile/step-N-worker-M.json.gz` itself.
    """

    def __init__(self, steps: Sequence[int], folder: Path, say: Callable[[str], None]) -> None:
        self.steps, self.folder, self.say = frozenset(steps), folder / FOLDER, say
        self.workers: Sequence[Sender] = ()
        self._running: Any = None
        self._traced: Sequence[Sender] = ()

    def begin(self, step: int) -> None:
        """A phase of this step begins."""
        if step not in self.steps or self._running is not None:
            return
        asked = [self._ask(worker, "start_profile", {"step": step}) for worker in self.workers]
        self._traced = [worker for worker, answer in zip(self.workers, asked, strict=True) if answer is not None]
        self._running = profiler()
        self._running.start()

    def end(self, step: int) -> None:
        """The step is done."""
        if self._running is None:
            return
        self._running.stop()
        try:
            said = [write(self._running, self.folder / f"step-{step}.json.gz")]
        except OSError as error:
            said = [f"warning: step {step} of the trainer is not traced: {error}"]
        self._running = None
        with ThreadPoolExecutor(max(1, len(self._traced))) as pool:
            answers = pool.map(lambda worker: self._ask(worker, "stop_profile", {}, WRITE_S), self._traced)
            said += [one_line(str(answer.get("said", ""))) for answer in answers if answer is not None]
        self._traced = ()
        for line in filter(None, said):
            self.say(line)

    def _ask(self, worker: Sender, verb: str, body: dict[str, Any], timeout_s: float | None = None) -> Any:
        """The worker's answer; None, and a warning, of one that is not traced."""
        try:
            return worker.call(verb, body, timeout_s)
        except RemoteError as error:
            self.say(f"warning: not traced: {error}")
            return None
