"""Starts the rollout workers of a run, and ends them with it.

    with Workers(spec, config, folder, policy) as workers:     # they come up meanwhile
        ...
        senders = workers.senders()                             # waits until each answers

Over HTTP each worker is a process, or one that already runs (transfer.sender.url); over Ray it is an actor; with
transfer=local it is the trainer itself, around the learner's own module.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import RunConfig
from rlhf.ending import RunError, keeping_sigterm
from rlhf.rollout.worker import Worker, WorkerSpec, architecture_of, build_model
from transfer.config import HttpSenderConfig, LocalConfig, RaySenderConfig

if TYPE_CHECKING:
    from transfer import Sender

    Connect = Callable[[], list[Sender]]  # waits until the workers are up

TOKEN_VARIABLE = "RLHF_WORKER_TOKEN"
STOP_S = 5.0  # how long a worker process may take to end before it is killed
LOG_TAIL = 20  # lines of a dead worker's log that its error shows
RAY_STORE_BYTES = 80 * 2**20  # Ray's least; weights do not travel through its object store
RAY_THREADS = 8  # so that `status` is answered while the actor samples
SOURCE = Path(__file__).resolve().parents[2]  # where `rlhf` and `transfer` are imported from


def worker_spec(policy: Any, config: RunConfig, endpoint: Mapping[str, Any]) -> WorkerSpec:
    """What a worker needs to hold a copy of `policy` and to take updates from the session of `endpoint`."""
    parameter = next(policy.parameters())
    dtype = config.rollout.dtype or config.model.dtype
    return WorkerSpec(
        architecture=architecture_of(policy),
        endpoint=dict(endpoint),
        dtype=dtype.name,
        device=parameter.device.type,
        attention=config.model.attention,
        threads=config.threads,
        token=secrets.token_hex(32),
    )


class Workers:
    """The run's `config.rollout.workers` workers, reached as `config.transfer` says; their logs go to `folder`."""

    def __init__(self, spec: WorkerSpec, config: RunConfig, folder: Path, policy: Any) -> None:
        self._spec, self._config, self._folder, self._policy = spec, config, folder, policy
        self._stack = ExitStack()
        self._senders: list[Sender] | None = None

    def __enter__(self) -> Workers:
        self._connect = self._stack.enter_context(self._start())
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def senders(self) -> list[Sender]:
        """One sender a worker, once all are up; RunError names a worker that did not come up."""
        if self._senders is None:
            senders = self._connect()
            for sender in senders:
                self._stack.enter_context(closing(sender))
            self._senders = senders
        return self._senders

    def _start(self) -> AbstractContextManager[Connect]:
        transfer, count = self._config.transfer, self._config.rollout.workers
        match transfer, transfer.sender:
            case LocalConfig(), _:
                return in_process(self._policy, self._spec)
            case _, HttpSenderConfig(url=[]) as sender:
                return processes(self._spec, count, sender, self._folder)
            case _, HttpSenderConfig() as sender:
                return running(count, sender)
            case _, RaySenderConfig() as sender:
                return ray_actors(self._spec, count, sender)
        raise AssertionError(transfer)


@contextmanager
def in_process(policy: Any, spec: WorkerSpec) -> Iterator[Connect]:
    """One worker around the learner's own module."""
    from transfer.senders.direct import DirectSender

    worker = Worker(policy, spec.endpoint)
    yield lambda: [DirectSender(worker, "worker 0 (local)")]


@contextmanager
def running(count: int, config: HttpSenderConfig) -> Iterator[Connect]:
    """Workers that somebody else started and will end; their token is in the environment."""
    from transfer.senders.http import HttpSender

    if count not in (1, len(config.url)):
        raise ValueError(
            f"transfer.sender.url names {len(config.url)} workers: rollout.workers must be as many, or 1 (got {count})"
        )
    token = os.environ.get(TOKEN_VARIABLE)
    yield lambda: [
        HttpSender(url, token, f"worker {index} ({url})", config.timeout_s) for index, url in enumerate(config.url)
    ]


@contextmanager
def processes(spec: WorkerSpec, count: int, config: HttpSenderConfig, folder: Path) -> Iterator[Connect]:
    """Worker processes behind HTTP, started all at once."""
    from transfer.senders.http import HttpSender

    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(index, spec, folder)) for index in range(count)]

        def connect() -> list[Sender]:
            deadline = time.monotonic() + config.start_timeout_s
            urls = [f"http://127.0.0.1:{worker.port(deadline)}" for worker in workers]
            return [
                HttpSender(url, spec.token, f"worker {index} ({url})", config.timeout_s)
                for index, url in enumerate(urls)
            ]

        yield connect


class WorkerProcess:
    """One worker process; it ends with this context, and with this process however that ends."""

    def __init__(self, index: int, spec: WorkerSpec, folder: Path) -> None:
        self.name = f"worker {index}"
        self._spec = spec
        self._log = folder / f"worker-{index}.log"

    def __enter__(self) -> WorkerProcess:
        path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
        variables = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(self._spec.threads)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlhf.rollout.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | variables,
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer
            )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # dead already: port() will say so
            self._process.stdin.write(self._spec.to_json().encode() + b"\n")
            self._process.stdin.flush()
        return self

    def port(self, deadline: float) -> int:
        """The port that the worker reports; RunError with its log if it dies or stays silent until `deadline`."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            ready = selector.select(max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RunError(
                f"{self.name} did not come up within transfer.sender.start_timeout_s; {self._log} ends:\n{self._tail()}"
            )
        report = self._process.stdout.readline()  # the worker writes the line in one piece, or dies
        if not report:
            raise RunError(f"{self.name} died while it started; {self._log} ends:\n{self._tail()}")
        return int(json.loads(report)["port"])

    def __exit__(self, *exception: object) -> None:
        with self._process:  # closes the pipes, then waits for a process that is gone
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_TAIL:])


class RayWorker(Worker):
    """A worker as a Ray actor: built in the actor's process."""

    def __init__(self, spec: WorkerSpec) -> None:
        import torch

        torch.set_num_threads(spec.threads)
        super().__init__(build_model(spec), spec.endpoint)


@contextmanager
def ray_actors(spec: WorkerSpec, count: int, config: RaySenderConfig) -> Iterator[Connect]:
    """Workers as Ray actors, in a private Ray unless `config.address` names one or this process is in one already."""
    import ray

    from transfer.senders.ray import RaySender

    variables = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": str(spec.threads)}
    actor_class = ray.remote(RayWorker).options(
        num_cpus=1, max_concurrency=RAY_THREADS, runtime_env={"env_vars": variables}
    )
    with ray_running(config.address, count), ExitStack() as stack:
        actors: list[Any] = []
        for _ in range(count):
            actors.append(actor_class.remote(spec))
            stack.callback(ray.kill, actors[-1])

        def connect() -> list[Sender]:
            deadline = time.monotonic() + config.start_timeout_s
            for index, actor in enumerate(actors):
                _await_actor(f"worker {index}", actor, deadline)
            return [RaySender(actor, f"worker {index} (ray)", config.timeout_s) for index, actor in enumerate(actors)]

        yield connect


@contextmanager
def ray_running(address: str | None, workers: int) -> Iterator[None]:
    """A Ray to run in: this process's own, or the one at `address`, or a private one that ends with the context."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else an actor that reserves no GPU sees none
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with keeping_sigterm():
        if address is None:
            ray.init("local", num_cpus=workers, include_dashboard=False, object_store_memory=RAY_STORE_BYTES, **quiet)
        else:
            ray.init(address, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _await_actor(name: str, actor: Any, deadline: float) -> None:
    import ray

    try:
        ray.get(actor.health.remote({}), timeout=max(0.0, deadline - time.monotonic()))
    except ray.exceptions.GetTimeoutError:
        raise RunError(f"{name} (ray) did not come up within transfer.sender.start_timeout_s") from None
    except ray.exceptions.RayError as error:
        raise RunError(f"{name} (ray) died while it started: {error}") from None
