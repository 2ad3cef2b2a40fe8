"""The workers: a plain worker as a process behind HTTP, or as a Ray actor."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tests.faults import moments, sabotage
from tests.faults.readers import HttpAsk
from tests.faults.relay import Network, Relay, Trap
from transfer.agreement.wire import loads
from transfer.worker.plain_worker import PlainSpec, PlainWorker
from transfer.worker.serve import serve_parent

if TYPE_CHECKING:
    from tests.faults.harness import Stage

FORKS = multiprocessing.get_context("forkserver")  # a process with all modules loaded, which forks in milliseconds
PRELOADED = [
    *("torch", "numpy", "xxhash", "requests", "safetensors.torch", "uvicorn", "uvicorn.loops.asyncio"),
    *(
        "uvicorn.protocols.http.httptools_impl",
        "starlette",
        "transfer.worker.app",
        "transfer.worker.plain_worker",
        "transfer.trainer.session",
    ),
    *(
        "transfer.backends.arena",
        "transfer.backends.disk",
        "transfer.backends.collective",
        "transfer.trainer.senders.http",
        "tests.faults.trainer",
    ),
]
START_S = 20.0


class HttpProcess:
    """One start of a worker behind HTTP, served as `python -m transfer.worker.plain_worker` serves it."""

    def __init__(self, spec: PlainSpec, log: Path, planted: str, stops: bool) -> None:
        self._alive, theirs = FORKS.Pipe()
        self._process = FORKS.Process(target=serve, args=(spec, str(log), planted, stops, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.pid = self._process.pid
        said = os.read(self._alive.fileno(), 1000) if wait([self._alive], START_S) else b""
        if not said:
            self.close()
        assert said, f"a worker did not come up within {START_S:g} s; see {log}"
        self.port: int = loads(said)["port"]

    def close(self) -> None:
        """Wait for its end, which comes when its stdin is closed, if it was not killed; may be called again."""
        if self._alive.closed:
            return
        self._alive.close()
        self._process.join(START_S)
        assert self._process.exitcode is not None, f"process {self.pid} has outlived its end"
        self._process.close()


def serve(spec: PlainSpec, log: str, planted: str, stops: bool, parent: Connection) -> None:
    """The worker's process: `parent` is its stdin and stdout."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 2)
    os.dup2(parent.fileno(), 0)
    os.dup2(parent.fileno(), 1)
    parent.close()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the life of the process
    sabotage.plant(planted)
    if stops:
        moments.in_worker(spec.journal)
    serve_parent(spec, lambda: PlainWorker(spec))


class Actor(PlainWorker):
    """A plain worker as a Ray actor, which tells its process."""

    def __init__(self, spec: PlainSpec, planted: str, stops: bool) -> None:
        sabotage.plant(planted)
        if stops:
            moments.in_worker(spec.journal)
        super().__init__(spec)

    def health(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Which process answers."""
        return {"pid": os.getpid()}


class HttpWorkers:
    """The workers of a case behind HTTP, each with its bad network."""

    overlap = 0.15

    def __init__(
        self, specs: Sequence[PlainSpec], folder: Path, random: Random, planted: str, stops: bool = False
    ) -> None:
        self._specs, self._folder, self._random, self._faults = specs, folder, random, (planted, stops)
        self._stack = ExitStack()
        self._processes: list[HttpProcess] = []
        self._relays: list[Relay] = []

    def __enter__(self) -> HttpWorkers:
        network = self._stack.enter_context(Network())
        for index in range(len(self._specs)):
            self._relays.append(Relay(network, self._random))
            self._processes.append(self._started(index))
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.close()
        self._stack.close()

    def orders(self) -> dict[str, object]:
        """Where the trainer finds them."""
        urls = tuple(f"http://127.0.0.1:{relay.port}" for relay in self._relays)
        return {"workers": urls, "token": self._specs[0].token}

    def pid(self, index: int) -> int:
        """The process of one."""
        return self._processes[index].pid

    def ask(self, index: int) -> HttpAsk:
        """For one thread to ask it."""
        return HttpAsk(lambda: self._relays[index].worker, self._specs[index].token)

    def killed(self, index: int, pid: int, away_s: float) -> None:
        """Start a killed one again, after some time."""
        self._processes[index].close()
        self._relays[index].worker = None
        time.sleep(away_s)
        self._processes[index] = self._started(index)

    def trap(self, step: str, answered: bool, pid: int, strike: Callable[[], None], trainer: Connection) -> None:
        """Call `strike` when some worker is told this step, or has answered it."""
        self._random.choice(self._relays).trap = Trap(step, answered, strike)

    def counts(self) -> Counter[str]:
        """What the networks did."""
        return sum((relay.mischief.counts for relay in self._relays), Counter())

    def _started(self, index: int) -> HttpProcess:
        process = HttpProcess(self._specs[index], self._folder / f"worker-{index}.log", *self._faults)
        self._relays[index].moved(process.port)
        return process


@contextmanager
def http_company(
    planted: str, stops: bool, ranks: bool = False
) -> Iterator[Callable[[Stage, Path, Random], HttpWorkers]]:
    """What makes the workers of a case."""
    FORKS.set_forkserver_preload([*PRELOADED, *["torch._dynamo", "tests.faults.ranks"] * ranks])
    yield lambda stage, folder, random: HttpWorkers(stage.specs(secrets.token_hex()), folder, random, planted, stops)
