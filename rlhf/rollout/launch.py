"""Starts the rollout workers of a run, and ends them with it.

    with Workers(spec, config, folder, policy) as workers:     # they come up meanwhile
        ...
        senders = workers.senders()                             # waits until each answers

Over HTTP each worker is a process, or one that already runs (transfer.sender.url); over Ray it is an actor; with
transfer=local it is the trainer itself, around the learner's own module. While the run goes on there may be more of
them, or fewer: who decides that is scaling.py.
"""

from __future__ import annotations

import copy
import os
import time
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import EvaluationConfig, RolloutConfig, RunConfig, VllmRolloutConfig
from rlhf.monitor.gpu import GPU_MEMORY
from rlhf.rollout.begun import Begin, Begun
from rlhf.rollout.ray_workers import ray_actors
from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.spec_of_run import gpus_of_workers, numbered
from rlhf.rollout.worker import Worker
from transfer.agreement.wire import TOKEN_VARIABLE, RemoteError
from transfer.config import HttpSenderConfig, LocalConfig, RaySenderConfig
from transfer.worker.process import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlhf.ranks.ray_hosts import Hosts
    from transfer import Sender

    Told = Callable[[int], WorkerSpec]  # what the worker of this number is told

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
        self._begun: list[Begun] = []
        self._senders: list[Sender] | None = None

    def __enter__(self) -> Workers:
        try:
            self._begin = self._stack.enter_context(self._start())
            for _ in range(self._first()):
                self.begin()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._begun, self._senders = [], []  # nobody is to ask them any more
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
        """One sender a worker, once all are up; an error names a worker that did not come up.

        The list is one and the same, and always that of the workers that may be asked now.
        """
        if self._senders is None:
            deadline = self.deadline()
            self._senders = [self.connect(begun, deadline) for begun in self._begun]
        return self._senders

    def gpu_memory(self) -> dict[str, float]:
        """MiB of a GPU that each worker has taken at most, by its own words; of those that say so, and answer."""
        found: dict[str, float] = {}
        for begun in list(self._begun):
            with suppress(RemoteError):
                mib = begun.sender.call("status", {}, STATUS_S).get(GPU_MEMORY) if begun.sender else None
                if isinstance(mib, int | float) and 0 <= mib < MOST_MIB:
                    found[f"{GPU_MEMORY}/worker-{begun.index}"] = mib
        return found

    # --- one by one -------------------------------------------------------------------------------------------------

    def asked(self) -> list[Begun]:
        """The workers that may be asked now, in the order of their senders."""
        of = {begun.sender: begun for begun in self._begun}
        return [of[sender] for sender in self._senders or ()]

    def begin(self) -> Begun:
        """Start one more, of the first number that is free; ValueError or RunError if that cannot be.

        To be called in a thread that lasts: worker processes end with the thread that started them.
        """
        return self._noted(self._begin(self._free()))

    def begin_at(self, url: str, token: str | None) -> Begun:
        """One more, which somebody else has started, and will end."""
        return self._noted(self._running(self._free(), url, token))

    def deadline(self) -> float:
        """Until when a worker that is started now must be up."""
        return time.monotonic() + self._config.transfer.sender.start_timeout_s

    def connect(self, begun: Begun, deadline: float) -> Sender:
        """Its sender, once it is up; an error names a worker that did not come up."""
        begun.sender = begun.stack.enter_context(closing(begun.connect(deadline)))
        return begun.sender

    def end(self, begun: Begun) -> None:
        """End one that nobody asks any more."""
        self._begun.remove(begun)
        begun.stack.close()

    def _noted(self, begun: Begun) -> Begun:
        self._stack.enter_context(begun.stack)
        self._begun.append(begun)
        return begun

    def _free(self) -> int:
        taken = {begun.index for begun in self._begun}
        return next(index for index in count() if index not in taken)

    def _told(self, index: int) -> WorkerSpec:
        """What the worker of this number is told."""
        spec = self._spec
        if spec.visible and index >= len(spec.visible):  # one of more than the run has begun with
            config = copy.copy(self._config)
            config.rollout = copy.copy(config.rollout)
            config.rollout.workers = index + 1
            spec = replace(spec, visible=gpus_of_workers(self._policy, config))
        return numbered(spec, index, self._folder)

    def _first(self) -> int:
        """How many the run begins with; ValueError unless `rollout.workers` is 1, or says what the URLs say."""
        workers, sender = self._config.rollout.workers, self._config.transfer.sender
        urls = sender.url if isinstance(sender, HttpSenderConfig) else []
        if urls and workers not in (1, len(urls)):
            raise ValueError(
                f"transfer.sender.url names {len(urls)} workers: rollout.workers must be as many, or 1 (got {workers})"
            )
        return len(urls) or workers

    def _start(self) -> AbstractContextManager[Begin]:
        transfer, rollout = self._config.transfer, self._config.rollout
        match transfer, transfer.sender:
            case LocalConfig(), _:
                return nullcontext(partial(in_process, self._policy, self._told))
            case _, HttpSenderConfig(url=[]) as sender if isinstance(rollout, VllmRolloutConfig) and rollout.serve:
                return nullcontext(served(self._policy, self._told, rollout, sender, self._folder))
            case _, HttpSenderConfig(url=[]) as sender:
                return nullcontext(processes(self._told, rollout, sender, self._folder))
            case _, HttpSenderConfig(url=urls):
                token = os.environ.get(TOKEN_VARIABLE)
                return nullcontext(lambda index: self._running(index, urls[index], token))
            case _, RaySenderConfig() as sender:
                return ray_actors(self._spec, self._told, rollout, sender, self._hosts)
        raise AssertionError(transfer)

    def _running(self, index: int, url: str, token: str | None) -> Begun:
        """One that runs already: a worker, or, of vLLM, a server, whose API key the token is, if it has one."""
        rollout = self._config.rollout
        if isinstance(rollout, VllmRolloutConfig):
            return vllm_server(self._policy, self._told(index), rollout, (index, url, token))
        return running(index, url, token, self._config.transfer.sender.timeout_s)


def in_process(policy: Any, told: Told, index: int) -> Begun:
    """One worker around the learner's own module."""
    from transfer.trainer.senders.direct import DirectSender

    spec = told(index)
    worker = Worker.around(policy, spec.endpoint, spec.journal, spec.batch_invariant)
    return Begun(index, lambda _: DirectSender(worker, "worker 0 (local)"))


def running(index: int, url: str, token: str | None, timeout_s: float) -> Begun:
    """A worker that somebody else started and will end."""
    from transfer.trainer.senders.http import HttpSender

    return Begun(index, lambda _: HttpSender(url, token, f"worker {index}", timeout_s))


def vllm_server(policy: Any, spec: WorkerSpec, config: VllmRolloutConfig, at: tuple[int, str, str | None]) -> Begun:
    """A vLLM server that somebody else started and will end."""
    from rlhf.rollout.vllm_server import server_at, worker_around
    from transfer.trainer.senders.direct import DirectSender

    index, url, key = at

    def connect(_: float) -> Sender:
        server = begun.stack.enter_context(closing(server_at(url, spec, config, key)))
        return DirectSender(worker_around(server, policy, spec), f"server {url}")

    begun = Begun(index, connect)
    return begun


def served(policy: Any, told: Told, config: VllmRolloutConfig, sender: HttpSenderConfig, folder: Path) -> Begin:
    """`vllm serve` processes of this run, which are started again if they die."""
    from rlhf.rollout.vllm_server import ServerSender, server_at, worker_around

    def around(url: str, spec: WorkerSpec) -> Worker:
        return worker_around(server_at(url, spec, config, None), policy, spec)

    def begin(index: int) -> Begun:
        spec, log = told(index), folder / f"worker-{index}.log"
        process = WorkerProcess(f"server {index}", "rlhf.rollout.vllm_serve", spec.to_json(), log, config.restarts)
        make = partial(around, spec=spec)
        return _process(index, process, lambda _: ServerSender(process.name, process, make, sender.start_timeout_s))

    return begin


def processes(told: Told, config: RolloutConfig, sender: HttpSenderConfig, folder: Path) -> Begin:
    """Worker processes behind HTTP; one that dies is started again, `config.restarts` times."""
    from transfer.trainer.senders.http import HttpSender

    def url(worker: WorkerProcess, deadline: float) -> str:
        return f"http://127.0.0.1:{worker.port(deadline)}"

    def begin(index: int) -> Begun:
        spec, log = told(index), folder / f"worker-{index}.log"
        worker = WorkerProcess(f"worker {index}", "rlhf.rollout.worker", spec.to_json(), log, config.restarts)

        def restart() -> str | None:
            return url(worker, time.monotonic() + sender.start_timeout_s) if worker.restarted() else None

        def connect(deadline: float) -> Sender:
            return HttpSender(url(worker, deadline), spec.token, worker.name, sender.timeout_s, restart)

        return _process(index, worker, connect)

    return begin


def _process(index: int, process: WorkerProcess, connect: Callable[[float], Sender]) -> Begun:
    begun = Begun(index, connect, lambda: process.reports)
    begun.stack.enter_context(process)
    return begun
