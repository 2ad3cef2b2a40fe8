"""The trainer's half of the weight transfer: agree once, then carry one version after the other to all workers.

    write      the bytes, where workers find them; nobody is told yet
    stage      start and update, to all workers at once
    finish     only when all have staged; else abort to all, and the live weights are the old ones everywhere

A version number is used up once any worker may have finished it; a push that fails earlier leaves it to the next one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from transfer import Sender, wire
from transfer.config import DiskConfig, IpcConfig, LocalConfig, TransferConfig
from transfer.manifest import DTYPES, Manifest

Weights = Mapping[str, torch.Tensor]
CLEAN_UP_S = 5.0  # deadline of abort and of questions after a failure: the worker may be gone
GRACE_S = 5.0  # a sender that outlasts its own deadline by this is given up


class Publisher(Protocol):
    """The sending half of a backend."""

    endpoint: dict[str, Any]  # what its receiving half is made from; JSON

    def prepare(self, manifest: Manifest, weights: Weights) -> dict[str, Any]: ...
    def write(self, version: int, weights: Weights, served: Collection[int]) -> dict[str, Any]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PushStats:
    """What one push moved and took: bytes of weights and of control messages (both ways, all workers), seconds."""

    bytes: int
    seconds: float
    write_seconds: float
    control_bytes: int


@dataclass(eq=False)
class _Worker:
    sender: Sender
    may_serve: set[int] = field(default_factory=set)  # versions; several while nobody knows


Failures = dict[_Worker, wire.RemoteError]


def make_publisher(config: TransferConfig, folder: Path) -> Publisher:
    """The sending half of the configured backend; `folder` is where it may write."""
    match config:
        case IpcConfig():
            from transfer.arena import ArenaPublisher

            return ArenaPublisher(config)
        case DiskConfig():
            from transfer.disk import DiskPublisher

            return DiskPublisher(config, folder)
        case LocalConfig():
            from transfer.local import LocalPublisher

            return LocalPublisher()
    raise ValueError(f"transfer must be one of ipc, disk, local (got {type(config).__name__})")


class Session:
    """Carries versions of one policy to a fixed set of workers; all serve the new one, or all go on with the old."""

    def __init__(self, publisher: Publisher, timeout_s: float) -> None:
        self._publisher = publisher
        self._timeout_s = timeout_s
        self._workers: list[_Worker] = []
        self._pool: ThreadPoolExecutor | None = None
        self._manifest = Manifest((), 0)
        self._epoch = 0
        self._version: int | None = None  # the newest that any worker may serve
        self._where: dict[str, Any] = {}  # its bytes
        self._control_bytes = 0
        self.endpoint: Mapping[str, Any] = publisher.endpoint  # what a worker is told, privately, at its launch; JSON
        self.last = PushStats(0, 0.0, 0.0, 0)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open(self, weights: Weights, senders: Sequence[Sender]) -> None:
        """Take the next epoch and agree with every worker; ValueError with the first differences, or TransferError."""
        if not senders:
            raise ValueError("a transfer needs at least one worker (got no senders)")
        self._shut_pool()
        self._pool = ThreadPoolExecutor(len(senders), thread_name_prefix="transfer")
        self._workers = [_Worker(sender) for sender in senders]
        status, failures = self._ask(self._workers, "status", {})
        self._raise("asking for the status", failures)
        self._manifest = Manifest.of(weights, _agreed_dtype(status))
        self._epoch = 1 + max(int(answer["epoch"]) for answer in status.values())
        newest = [answer["newest"] for answer in status.values() if answer["newest"] is not None]
        self._version = max(newest, default=None)
        self._where = {}
        info = {
            "epoch": self._epoch,
            "manifest": self._manifest.to_json(),
            "timeout_s": self._timeout_s,
            "where": self._publisher.prepare(self._manifest, weights),
        }
        _, failures = self._ask(self._workers, "init_weight_transfer_engine", {"init_info": info})
        for failure in failures.values():
            if failure.status == 422:
                raise ValueError(str(failure)) from failure
        self._raise("agreeing on the weights", failures)

    def push(self, weights: Weights) -> int:
        """Make `weights` the live ones in every worker, or in none; the new version. TransferError: who failed, why."""
        began = time.monotonic()
        self._control_bytes = 0
        if not self._workers:
            raise ValueError("open the transfer before the first push")
        version = 0 if self._version is None else self._version + 1
        self._check(weights, version)
        self._catch_up()
        writing = time.monotonic()
        served = {live for worker in self._workers for live in worker.may_serve}
        try:
            where = self._publisher.write(version, weights, served)
        except OSError as error:
            raise wire.TransferError(f"writing version {version} failed: {error}") from error
        written = time.monotonic()
        self._update(self._workers, version, where)
        nbytes = self._manifest.nbytes if where else 0  # a backend that says no place has moved nothing
        self.last = PushStats(nbytes, time.monotonic() - began, written - writing, self._control_bytes)
        return version

    def close(self) -> None:
        """Give up what the backend holds; workers keep the version that they have."""
        self._shut_pool()
        self._workers = []
        self._publisher.close()

    # --- one update ---------------------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Bring workers that missed the end of the last update to its version: then no slot but that one is served."""
        behind = [worker for worker in self._workers if worker.may_serve not in ({self._version}, set())]
        if behind and self._version is not None:
            self._abort(behind, self._version)
            self._update(behind, self._version, self._where)

    def _update(self, workers: list[_Worker], version: int, where: Mapping[str, Any]) -> None:
        failures = self._stage(workers, version, where)
        if failures:
            self._abort(workers, version)
            self._raise(f"staging version {version}", failures)
        failures = self._finish(workers, version)
        if any(version in worker.may_serve for worker in workers):
            self._version, self._where = version, dict(where)
        self._raise(f"finishing version {version}", failures)

    def _stage(self, workers: list[_Worker], version: int, where: Mapping[str, Any]) -> Failures:
        named = {"epoch": self._epoch, "version": version}

        def stage(worker: _Worker) -> int:
            said = self._say(worker, "start_weight_update", named)[1]
            return said + self._say(worker, "update_weights", {"update_info": {**named, "where": where}})[1]

        sizes, failures = self._each(workers, stage, 2 * self._timeout_s)
        self._control_bytes += sum(sizes.values())
        return failures

    def _finish(self, workers: list[_Worker], version: int) -> Failures:
        body = {"epoch": self._epoch, "weight_version": str(version)}
        answers, failures = self._ask(workers, "finish_weight_update", body)
        for worker in answers:
            worker.may_serve = {version}
        for worker in failures:
            worker.may_serve = worker.may_serve | {version}
        for worker in self._finished_unheard(list(failures), version):
            worker.may_serve = {version}
            del failures[worker]
        self._abort(list(failures), version)
        return failures

    def _finished_unheard(self, workers: list[_Worker], version: int) -> list[_Worker]:
        """Which of these workers serve `version`, although their answer was lost."""
        answers, _ = self._ask(workers, "status", {}, CLEAN_UP_S)
        return [w for w, a in answers.items() if a["version"] == version and a["epoch"] == self._epoch]

    def _abort(self, workers: list[_Worker], version: int) -> None:
        """Give the update up; a worker that confirms it will not serve it."""
        body = {"epoch": self._epoch, "version": version}
        confirmed, _ = self._ask(workers, "abort_weight_update", body, CLEAN_UP_S)
        for worker in confirmed:
            worker.may_serve = worker.may_serve - {version}

    def _check(self, weights: Weights, version: int) -> None:
        """TransferError unless the tensors are those agreed on, and finite also in the dtype that travels."""
        if weights.keys() != self._manifest.by_name.keys():
            changed = sorted(weights.keys() ^ self._manifest.by_name.keys())
            raise wire.TransferError(f"version {version}: other names than agreed on: {', '.join(changed[:10])}")
        for entry in self._manifest.entries:
            tensor = weights[entry.name]
            if tuple(tensor.shape) != entry.shape:
                raise wire.TransferError(f"version {version}: {entry.name} is not the {list(entry.shape)} agreed on")
            if any(weights[alias].data_ptr() != tensor.data_ptr() for alias in entry.aliases):
                raise wire.TransferError(f"version {version}: {entry.name} is no longer tied to {entry.aliases}")
        bad = _not_finite(weights, self._manifest)
        if bad is not None:
            raise wire.TransferError(f"version {version}: {bad} has values that are not finite; nothing was sent")

    # --- talking to several workers -----------------------------------------------------------------------------------

    def _ask(
        self, workers: list[_Worker], verb: str, body: Mapping[str, Any], timeout_s: float | None = None
    ) -> tuple[dict[_Worker, dict[str, Any]], Failures]:
        """One verb to all workers at once: their answers, and who gave none."""
        deadline = min(self._timeout_s, timeout_s or self._timeout_s)
        said, failures = self._each(workers, lambda worker: self._say(worker, verb, body, deadline), deadline)
        self._control_bytes += sum(size for _, size in said.values())
        return {worker: answer for worker, (answer, _) in said.items()}, failures

    def _say(
        self, worker: _Worker, verb: str, body: Mapping[str, Any], timeout_s: float | None = None
    ) -> tuple[dict[str, Any], int]:
        answer = worker.sender.call(verb, body, timeout_s or self._timeout_s)
        return answer, len(json.dumps(body)) + len(json.dumps(answer))

    def _each(
        self, workers: list[_Worker], talk: Callable[[_Worker], Any], timeout_s: float
    ) -> tuple[dict[_Worker, Any], Failures]:
        assert self._pool is not None
        jobs = {worker: self._pool.submit(talk, worker) for worker in workers}
        wait(jobs.values(), timeout=timeout_s + GRACE_S)
        answers: dict[_Worker, Any] = {}
        failures: Failures = {}
        for worker, job in jobs.items():
            if not job.done():
                failures[worker] = wire.RemoteError(worker.sender.name, "call", 0, "its sender does not come back")
            elif job.exception() is None:
                answers[worker] = job.result()
            else:
                failures[worker] = _as_remote(job.exception(), worker.sender.name)
        return answers, failures

    def _raise(self, phase: str, failures: Failures) -> None:
        if failures:
            reasons = "; ".join(str(failure) for failure in failures.values())
            raise wire.TransferError(f"{phase} failed: {reasons}") from next(iter(failures.values()))

    def _shut_pool(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _agreed_dtype(status: Mapping[_Worker, Mapping[str, Any]]) -> torch.dtype | None:
    """The one floating-point dtype of all workers, to cast to; None where their models mix several."""
    wanted = {worker.sender.name: answer["dtype"] for worker, answer in status.items()}
    if len(set(wanted.values())) > 1:
        raise ValueError(f"all workers must have one dtype, so that the weights can be written once (got {wanted})")
    name = next(iter(wanted.values()))
    return None if name is None else DTYPES[name]


def _as_remote(error: BaseException | None, name: str) -> wire.RemoteError:
    if isinstance(error, wire.RemoteError):
        return error
    return wire.RemoteError(name, "call", 0, f"{type(error).__name__}: {error}")


@torch.no_grad()
def _not_finite(weights: Weights, manifest: Manifest) -> str | None:
    """The first tensor with a value that is NaN, infinite, or beyond the dtype that travels; None if there is none."""
    floats = [(e, weights[e.name]) for e in manifest.entries if weights[e.name].is_floating_point()]
    floats = [(e, t if t.dtype.itemsize > 1 else t.float()) for e, t in floats if t.numel()]
    if not floats:
        return None
    norms = torch.stack(list(torch._foreach_norm([t for _, t in floats]))).double().cpu()  # one pass
    limits = torch.tensor([torch.finfo(e.torch_dtype).max for e, _ in floats], dtype=torch.float64)
    suspects = [floats[i] for i in (~(norms <= limits)).nonzero().flatten().tolist()]  # no value exceeds its norm
    for entry, tensor in suspects:  # NaN, infinite, or so large that the norm overflowed
        if not float(torch.stack(torch.aminmax(tensor)).abs().max()) <= torch.finfo(entry.torch_dtype).max:
            return entry.name
    return None
