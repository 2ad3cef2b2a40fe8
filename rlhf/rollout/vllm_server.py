"""Rollout workers that are ordinary vLLM servers: running ones (transfer.sender.url), driven by their own routes.

A server samples and takes weights; everything that it lacks, from versions to a refusal while weights are torn, is a
worker (worker.py) in the trainer's process around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.rollout.build import config_of, limits_of
from rlhf.rollout.sampling import Sample, Sampling
from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.vllm import manifest_of
from rlhf.rollout.worker import Worker
from transfer.agreement.journal import Journal
from transfer.agreement.wire import RemoteError
from transfer.trainer.senders.direct import DirectSender
from transfer.vllm.server_ends import ServerIntake, ServerLanding
from transfer.vllm.stock import RlhfIpc, StockIpc, StockServer, UpdatePolicy
from transfer.worker.process import WorkerProcess
from transfer.worker.receiver import Receiver

if TYPE_CHECKING:
    import torch

    from rlhf.config import VllmRolloutConfig

LOOK_S = 0.05  # between two looks at whether new weights want to come in


def server_at(url: str, spec: WorkerSpec, config: VllmRolloutConfig, api_key: str | None) -> StockServer:
    """The server there, which takes weights by our plug-in, or by vLLM's own backend where nothing is shared."""
    ours = spec.endpoint["backend"] != "local"
    policy = UpdatePolicy(
        in_flight=config.in_flight,
        clear_cache=not config.keep_prefix_cache,
        finite=not ours,
        found_paused=config.found_paused,
    )
    return StockServer(url, config.timeout_s, RlhfIpc() if ours else StockIpc(), policy, api_key)


def worker_around(server: StockServer, policy: Any, spec: WorkerSpec) -> Worker:
    """A worker around the server; `policy` is the trainer's module, whose tensors vLLM's own backend takes."""

    def weights() -> Iterable[tuple[str, torch.Tensor]]:
        return ((name, parameter.detach()) for name, parameter in policy.named_parameters())

    shape = config_of(spec)
    landing = ServerLanding(manifest_of(shape, spec), server, weights)
    journal = Journal(Path(spec.journal) if spec.journal else None)
    receiver = Receiver(ServerIntake(spec.endpoint, server, weights), landing, journal)
    return Worker(ServerEngine(server), receiver, limits_of(shape.get_text_config()))


class ServerSender(DirectSender):
    """To the worker around a server of this run, which is started again if it dies: then the worker is another, too."""

    def __init__(self, name: str, process: WorkerProcess, make: Callable[[str], Worker], timeout_s: float) -> None:
        self._process, self._make, self._start_timeout_s = process, make, timeout_s
        super().__init__(self._made(), name)

    def call(self, verb: str, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """As the worker answers; RemoteError, with status 0, once the server is gone."""
        if not self._process.alive:
            raise RemoteError(self.name, verb, 0, "the server has died")
        return super().call(verb, body, timeout_s)

    def restart(self) -> bool:
        """Start the server anew that has died; False if it lives, or was started too often."""
        if not self._process.restarted():
            return False
        self._worker = self._made()
        return True

    def _made(self) -> Worker:
        port = self._process.port(time.monotonic() + self._start_timeout_s)
        return self._make(f"http://127.0.0.1:{port}")


class ServerEngine:
    """Samples from a vLLM server."""

    sleep_levels = (1, 2)

    def __init__(self, server: StockServer) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(64, thread_name_prefix="vllm-server")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        turn: Callable[[], int | None],
    ) -> list[Sample]:
        """Sample row j of prompt i at index i*n + j; on None from `turn` unfinished rows end with reason "abort"."""
        version = turn()
        if version is None:
            return [Sample.empty() for _ in range(len(prompts) * sampling.n)]
        body = {
            "prompt": [list(prompt) for prompt in prompts],
            "seeds": [seed + first for seed, first in zip(seeds, sampling.firsts or [0] * len(prompts), strict=True)],
            "n": sampling.n,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": list(sampling.stop_ids),
            **sampling.cut.told,
        }
        asked = self._pool.submit(self._server.complete, body)
        while True:
            try:
                answer = asked.result(LOOK_S)
                break
            except Late:
                if turn() is None:
                    self._server.pause()  # by the policy, which then aborts; the update that wants in resumes
        return [_sample(choice, version) for choice in answer["choices"]]

    def sleep(self, level: int) -> None:
        """Let the server give GPU memory back."""
        self._server.sleep(level)

    def wake_up(self, tags: Sequence[str]) -> bool:
        """Wake what `tags` name, or all; whether all is awake."""
        self._server.wake_up(tags)
        return not self._server.asleep


def _sample(choice: dict[str, Any], version: int) -> Sample:
    sample = Sample.empty()
    sample.grow(choice["token_ids"], choice["logprobs"]["token_logprobs"], version)
    sample.finish_reason = choice["finish_reason"]
    return sample
