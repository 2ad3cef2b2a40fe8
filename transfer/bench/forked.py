"""Receiving processes that start at once: forked from one that has imported what they need."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Self

import torch.multiprocessing

from transfer.bench.lab import START_S, Unavailable
from transfer.worker.plain_worker import PlainSpec
from transfer.worker.serve import serve_parent

PRELOADED = ["transfer.bench.peer_worker", "transfer.bench.worker", "transfer.worker.app", "uvicorn", "xxhash", "numpy"]
STOP_S = 5.0  # how long a process may take to end before it is killed


class Forked:
    """`target(pipe, *arguments)` in a process of its own; ends with this context, and when this process dies."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = torch.multiprocessing.get_context("forkserver")
        assert isinstance(context, ForkServerContext)
        context.set_forkserver_preload(PRELOADED)
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        with theirs:
            self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pipe.close()
        self._process.terminate()
        self._process.join(STOP_S)
        self._process.kill()
        self._process.join()
        self._process.close()


class ForkedWorker(Forked):
    """A BenchWorker behind HTTP, as the rollout workers of a run are; errors it prints go to `log`.

    With `parts` its model is cut over these devices.
    """

    def __init__(self, spec: PlainSpec, log: Path, parts: Sequence[str] = ()) -> None:
        super().__init__(serve_worker, spec.to_json(), str(log), list(parts))
        self._log = log

    def url(self) -> str:
        """Where it listens, once it does; Unavailable with its log if it dies or stays silent."""
        with suppress(OSError):
            if self.pipe.poll(START_S) and (line := os.read(self.pipe.fileno(), 100)):
                return f"http://127.0.0.1:{json.loads(line)['port']}"
        log = self._log.read_text(errors="replace", encoding="utf-8").splitlines() if self._log.exists() else []
        raise Unavailable(f"the worker did not come up: {' / '.join(log[-5:])}")


def serve_worker(pipe: Connection, spec: str, log: str, parts: list[str]) -> None:
    """What a worker started by WorkerProcess does, with the pipe as stdin and stdout."""
    from transfer.bench.tensor_parallel import TensorParallelWorker
    from transfer.bench.worker import BenchWorker

    for descriptor in (0, 1):
        os.dup2(pipe.fileno(), descriptor)
    pipe.close()
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stdin = os.fdopen(0)
    told = PlainSpec(**json.loads(spec))
    serve_parent(told, lambda: TensorParallelWorker(told, parts) if parts else BenchWorker(told))
