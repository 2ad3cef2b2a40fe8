"""Starts the rollout workers of a run, and ends them with it.

    with Workers(spec, config, folder, policy) as workers:     # they come up meanwhile
        ...
        senders = workers.senders()                             # waits until each answers

Over HTTP each worker is a process, or one that already runs (transfer.sender.url); over Ray it is an actor; with
transfer=local it is the trainer itself, around the learner's own module.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import EvaluationConfig, RolloutConfig, RunConfig, VllmRolloutConfig
from rlhf.monitor.gpu import GPU_MEMORY
from rlhf.rollout.ray_workers import ray_actors
from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.spec_of_run import specs
from rlhf.rollout.worker import Worker
from transfer.agreement.wire import TOKEN_VARIABLE, RemoteError
from transfer.config import HttpSenderConfig, LocalConfig, RaySenderConfig
from transfer.worker.process import WorkerProcess

if TYPE_CHECKING:
    from rlhf.ranks.ray_hosts import Hosts
    from rlhf.rollout.ray_workers import Connect
    from transfer import Sender

STATUS_S = 1.0  # how long somebody waits who asks all workers, every second, how much memory they use
MOST_MIB = 2**40  # that a worker may say it has of a GPU


class Workers:
    """The run's `config.rollout.workers` workers, reached as `config.transfer` says; their logs go to `folder`."""

    def __init__(
        self,
        spec: WorkerSpec,
        config: RunConfig | EvaluationConfig,
        folder: Path,
        policy: Any,
        hosts: Hosts | None = None,
    ) -> None:
        self._spec, self._config, self._folder, self._policy = spec, config, folder, policy
        self._hosts = hosts  # that Ray's actors are placed on
        self._stack = ExitStack()
        self._senders: list[Sender] | None = None

    def __enter__(self) -> Workers:
        self._connect = self._stack.enter_context(self._start())
        return self

    def __exit__(self, *exception: object) -> None:
        self._senders = []  # nobody is to ask them any more
        self._stack.close()

    def awaited(self) -> str | None:
        """What takes long until vLLM's workers of this run are up, in one line; None of other workers."""
        rollout, sender = self._config.rollout, self._config.transfer.sender
        if not isinstance(rollout, VllmRolloutConfig) or (isinstance(sender, HttpSenderConfig) and sender.url):
            return None
        graphs = self._spec.device == "cuda" and not rollout.engine_args.get("enforce_eager")
        count = f"{rollout.workers} worker{'s' if rollout.workers > 1 else ''}"
        log = f"; its log: {self._folder / 'worker-0.log'}" if isinstance(sender, HttpSenderConfig) else ""
        return f"waiting for {count}: vLLM loads{', compiles and captures CUDA graphs' if graphs else ''}{log}"

    def senders(self) -> list[Sender]:
        """One sender a worker, once all are up; an error names a worker that did not come up."""
        if self._senders is None:
            senders = self._connect()
            for sender in senders:
                self._stack.enter_context(closing(sender))
            self._senders = senders
        return self._senders

    def gpu_memory(self) -> dict[str, float]:
        """MiB of a GPU that each worker has taken at most, by its own words; of those that say so, and answer."""
        found: dict[str, float] = {}
        for index, sender in enumerate(self._senders or ()):
            with suppress(RemoteError):
                mib = sender.call("status", {}, STATUS_S).get(GPU_MEMORY)
                if isinstance(mib, int | float) and 0 <= mib < MOST_MIB:
                    found[f"{GPU_MEMORY}/worker-{index}"] = mib
        return found

    def _start(self) -> AbstractContextManager[Connect]:
        transfer, rollout = self._config.transfer, self._config.rollout
        match transfer, transfer.sender:
            case LocalConfig(), _:
                (told,) = specs(self._spec, 1, self._folder)
                return in_process(self._policy, told)
            case _, HttpSenderConfig(url=[]) as sender if isinstance(rollout, VllmRolloutConfig) and rollout.serve:
                return served(self._policy, self._spec, rollout, sender, self._folder)
            case _, HttpSenderConfig(url=[]) as sender:
                return processes(self._spec, rollout, sender, self._folder)
            case _, HttpSenderConfig() as sender if isinstance(rollout, VllmRolloutConfig):
                return vllm_servers(self._policy, self._spec, rollout, sender, self._folder)
            case _, HttpSenderConfig() as sender:
                return running(rollout.workers, sender)
            case _, RaySenderConfig() as sender:
                return ray_actors(self._spec, rollout, sender, self._folder, self._hosts)
        raise AssertionError(transfer)


@contextmanager
def in_process(policy: Any, spec: WorkerSpec) -> Iterator[Connect]:
    """One worker around the learner's own module."""
    from transfer.trainer.senders.direct import DirectSender

    worker = Worker.around(policy, spec.endpoint, spec.journal, spec.batch_invariant)
    yield lambda: [DirectSender(worker, "worker 0 (local)")]


@contextmanager
def running(count: int, config: HttpSenderConfig) -> Iterator[Connect]:
    """Workers that somebody else started and will end; their token is in the environment."""
    from transfer.trainer.senders.http import HttpSender

    _check_count(count, config)
    token = os.environ.get(TOKEN_VARIABLE)
    yield lambda: [
        HttpSender(url, token, f"worker {index} ({url})", config.timeout_s) for index, url in enumerate(config.url)
    ]


def _check_count(count: int, config: HttpSenderConfig) -> None:
    """ValueError unless `rollout.workers` is left alone, or says what the URLs say."""
    if count not in (1, len(config.url)):
        raise ValueError(
            f"transfer.sender.url names {len(config.url)} workers: rollout.workers must be as many, or 1 (got {count})"
        )


@contextmanager
def vllm_servers(
    policy: Any, spec: WorkerSpec, config: VllmRolloutConfig, sender: HttpSenderConfig, folder: Path
) -> Iterator[Connect]:
    """vLLM servers that somebody else started and will end; their API key is in the environment, if they have one."""
    from rlhf.rollout.vllm_server import server_at, worker_around
    from transfer.trainer.senders.direct import DirectSender

    _check_count(config.workers, sender)
    key = os.environ.get(TOKEN_VARIABLE)
    with ExitStack() as stack:

        def connect() -> list[Sender]:
            senders: list[Sender] = []
            for url, told in zip(sender.url, specs(spec, len(sender.url), folder), strict=True):
                server = stack.enter_context(closing(server_at(url, told, config, key)))
                senders.append(DirectSender(worker_around(server, policy, told), f"server {url}"))
            return senders

        yield connect


@contextmanager
def served(
    policy: Any, spec: WorkerSpec, config: VllmRolloutConfig, sender: HttpSenderConfig, folder: Path
) -> Iterator[Connect]:
    """`vllm serve` processes of this run, started all at once, and again if they die."""
    from rlhf.rollout.vllm_server import ServerSender, server_at, worker_around

    def around(url: str, told: WorkerSpec) -> Worker:
        return worker_around(server_at(url, told, config, None), policy, told)

    with ExitStack() as stack:
        started = []
        for index, told in enumerate(specs(spec, config.workers, folder)):
            log = folder / f"worker-{index}.log"
            process = WorkerProcess(f"server {index}", "rlhf.rollout.vllm_serve", told.to_json(), log, config.restarts)
            started.append((stack.enter_context(process), partial(around, told=told)))
        yield lambda: [ServerSender(process.name, process, make, sender.start_timeout_s) for process, make in started]


@contextmanager
def processes(spec: WorkerSpec, config: RolloutConfig, sender: HttpSenderConfig, folder: Path) -> Iterator[Connect]:
    """Worker processes behind HTTP, started all at once; one that dies is started again, `config.restarts` times."""
    from transfer.trainer.senders.http import HttpSender

    def url(worker: WorkerProcess, deadline: float) -> str:
        return f"http://127.0.0.1:{worker.port(deadline)}"

    def connected(worker: WorkerProcess, deadline: float) -> Sender:
        def restart() -> str | None:
            return url(worker, time.monotonic() + sender.start_timeout_s) if worker.restarted() else None

        return HttpSender(url(worker, deadline), spec.token, worker.name, sender.timeout_s, restart)

    with ExitStack() as stack:
        workers = []
        for index, told in enumerate(specs(spec, config.workers, folder)):
            name, log = f"worker {index}", folder / f"worker-{index}.log"
            process = WorkerProcess(name, "rlhf.rollout.worker", told.to_json(), log, config.restarts)
            workers.append(stack.enter_context(process))

        def connect() -> list[Sender]:
            deadline = time.monotonic() + sender.start_timeout_s
            return [connected(worker, deadline) for worker in workers]

        yield connect
