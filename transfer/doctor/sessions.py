"""Real transfers of 1 MiB: through make_transfer to a real worker, whose live weights must have the digest sent."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfer.agreement.wire import TransferError
from transfer.config import (
    CollectiveConfig,
    DiskConfig,
    HttpSenderConfig,
    IpcConfig,
    LocalConfig,
    RaySenderConfig,
    SenderConfig,
    Staging,
    Take,
    TransferConfig,
)
from transfer.doctor.finding import Finding, Problem, ok
from transfer.doctor.load import patient
from transfer.worker.process import WorkerProcess, python_path
from transfer.worker.ray_start import QUIET, SHORT_PATH, STORE_BYTES, set_environment

if TYPE_CHECKING:
    import torch

    from transfer.trainer.interfaces import Sender
    from transfer.worker.plain_worker import PlainSpec

TENSORS, ELEMENTS = 16, 16384  # float32: 1 MiB in all
PUSHES = 10
WORKER = "transfer.worker.plain_worker"  # the module of the process
LOOPBACK = "127.0.0.1"
TIMEOUT_S = 8.0  # of one message
START_S = 15.0  # for a worker to come up
NEEDS = {
    "http": ("httptools", "starlette", "uvicorn"),
    "ray": ("ray",),
    "ipc": ("numpy", "xxhash"),
    "gloo": ("numpy", "xxhash"),
    "disk": ("safetensors", "xxhash"),
    "one-shot": ("numpy", "xxhash"),
    "local": (),
}
RAY_ACTOR: list[Any] = []  # of this process; one for all its checks, since to start one takes seconds


def session(
    backend: str, sender: str, staging: str = "", take: str = "", device: str = "cpu", worker_device: str = ""
) -> Finding:
    """Push PUSHES versions to a worker, and each time ask it for the digest of what it serves then."""
    _require(backend, sender)
    from transfer import make_transfer
    from transfer.agreement.manifest import Manifest

    weights = _weights(device)
    config = _config(backend, sender, staging, take)
    with _folder() as folder, make_transfer(config, folder) as transfer:
        manifest = Manifest.of(weights)
        spec = _spec(manifest.to_json(), transfer.endpoint, worker_device or device)
        with _worker(sender, spec, folder) as worker:
            transfer.open(weights, [worker])
            milliseconds = []
            for _ in range(PUSHES):
                transfer.withdraw()
                _train(weights)
                version = transfer.push(weights)
                milliseconds.append(1e3 * transfer.last.seconds)
                _compare(worker.call("completions", {}), version, [weights[e.name] for e in manifest.entries])
            plan = str(worker.call("status", {})["plan"])
    return _moved(milliseconds, plan)


def shards(device: str = "cpu") -> Finding:
    """Push weights that are sharded over two ranks, processes of their own, to a worker that holds all of them."""
    _require("ipc", "http")
    from transfer.bench.lab import Unavailable
    from transfer.bench.ranks import Setting, measured
    from transfer.bench.shapes import Model

    shape: tuple[int, ...] = (128, ELEMENTS // 128)
    tensors = {f"layers.{index}.weight": ("float32", shape) for index in range(TENSORS)}
    with _folder() as folder:
        setting = Setting(
            model=Model("1 MiB", tensors),
            ranks=2,
            workers=1,
            parts=1,
            device=device.partition(":")[0],
            repeats=PUSHES,
            folder=folder,
            progress=lambda *_, **__: None,
        )
        try:
            row = measured(setting).rows[-1]
        except Unavailable as error:
            raise Problem(str(error)) from None
    if row.failed or not row.right:
        raise Problem(row.failed or "the worker holds other bytes than gathering gives")
    return _moved([1e3 * seconds for seconds in row.push], row.plan)


def local() -> Finding:
    """The same with a sampler that uses the learner's own tensors: no bytes move, only the version."""
    _require("local")
    from transfer import make_transfer
    from transfer.agreement.manifest import Manifest
    from transfer.trainer.senders.direct import DirectSender
    from transfer.worker.plain_worker import PlainWorker

    with _folder() as folder, make_transfer(LocalConfig(), folder) as transfer:
        worker = PlainWorker(_spec(Manifest.of(_weights("cpu")).to_json(), transfer.endpoint, "cpu"))
        with closing(worker):
            transfer.open(worker.weights, [DirectSender(worker, "worker 0")])
            _train(worker.weights)
            version = transfer.push(worker.weights)
            _compare(worker.completions({}), version, list(worker.weights.values()))
            return ok(f"the version alone changes, in {1e3 * transfer.last.seconds:.1f} ms; nothing is moved")


def one_shot(sender: str = "http", device: str = "cpu") -> Finding:
    """Send PUSHES times with the one-shot API, and each time ask the worker for the digest of what it serves then."""
    _require("one-shot", sender)
    from transfer import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine
    from transfer.agreement.manifest import Manifest
    from transfer.agreement.wire import TOKEN_VARIABLE

    weights = _weights(device)
    manifest = Manifest.of(weights)
    spec = _spec(manifest.to_json(), {"backend": "local"}, device)
    os.environ[TOKEN_VARIABLE] = spec.token
    with _folder() as folder, WorkerProcess("worker 0", WORKER, spec.to_json(), folder / "log") as it:
        url = _url(it)
        with closing(_http_sender(url, spec.token)) as worker:
            milliseconds = []
            for version in range(PUSHES):
                _train(weights)
                began = time.monotonic()
                IPCWeightTransferEngine.trainer_send_weights(
                    weights.items(), IPCTrainerSendWeightsArgs(mode=sender, url=url)
                )
                milliseconds.append(1e3 * (time.monotonic() - began))
                _compare(worker.call("completions", {}), version, [weights[e.name] for e in manifest.entries])
    return _moved(milliseconds)


def ray_start() -> Finding:
    """Start a private Ray, which the checks that follow in this process use."""
    _require("ray")
    began = time.monotonic()
    import ray

    _start_ray()
    return ok(f"Ray {ray.__version__} started in {time.monotonic() - began:.1f} s")


# --- what a transfer needs --------------------------------------------------------------------------------------------


def _require(*parts: str) -> None:
    """Problem with the packages that are missing for these backends and senders."""
    wanted = dict.fromkeys(["torch", *(name for part in parts for name in NEEDS[part])])
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise Problem(f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")


def _config(backend: str, sender: str, staging: str, take: str) -> TransferConfig:
    kinds: dict[str, type[SenderConfig]] = {"http": HttpSenderConfig, "ray": RaySenderConfig}
    told = kinds[sender](timeout_s=patient(TIMEOUT_S), start_timeout_s=patient(START_S))
    if backend == "gloo":
        return CollectiveConfig(sender=told)
    if backend == "disk":
        return DiskConfig(sender=told)
    return IpcConfig(sender=told, staging=Staging(staging), take=Take(take))


def _weights(device: str) -> dict[str, torch.Tensor]:
    import torch

    torch.set_num_threads(1)
    return {f"layers.{index:02d}.weight": torch.randn(ELEMENTS, device=device) for index in range(TENSORS)}


def _train(weights: Mapping[str, torch.Tensor]) -> None:
    for tensor in weights.values():
        tensor.add_(1.0)


def _spec(manifest: dict[str, Any], endpoint: Mapping[str, Any], device: str) -> PlainSpec:
    from transfer.worker.plain_worker import PlainSpec

    return PlainSpec(manifest=manifest, endpoint=dict(endpoint), device=device, token=secrets.token_urlsafe(32))


def _compare(served: Mapping[str, Any], version: int, weights: list[torch.Tensor]) -> None:
    """Problem unless the worker serves exactly these weights under this version."""
    from transfer.memory.digest import digest_of

    expected = digest_of(weights, like=served["digest"])
    if served["digest"] != expected:
        raise Problem(f"after version {version} the worker serves other weights than were sent", "please report this")
    if served["version"] != version:
        raise Problem(f"the worker calls version {version} {served['version']}", "please report this")


def _moved(milliseconds: list[float], plan: str = "") -> Finding:
    best, median = min(milliseconds), statistics.median(milliseconds)  # other checks keep the machine busy meanwhile
    nbytes = 4 * TENSORS * ELEMENTS
    seen = f"{len(milliseconds)} times {nbytes / 2**20:g} MiB, at best in {best:.1f} ms; every digest right"
    seen += f"; {plan}" if plan else ""
    return ok(seen, ms=round(best, 3), median_ms=round(median, 3), bytes=nbytes, pushes=len(milliseconds))


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="session-") as folder:
        yield Path(folder)


@contextmanager
def _worker(sender: str, spec: PlainSpec, folder: Path) -> Iterator[Sender]:
    """A worker in another process, that answers."""
    if sender == "ray":
        yield _ray_worker(spec)
        return
    log = folder / "worker.log"
    with (
        WorkerProcess("worker 0", WORKER, spec.to_json(), log) as process,
        closing(_http_sender(_url(process), spec.token)) as http,
    ):
        yield http


def _url(process: WorkerProcess) -> str:
    """Where a worker listens; Problem if it cannot be reached there."""
    try:
        port = process.port(time.monotonic() + patient(START_S))
    except TransferError as error:  # several lines, of which the last is of the worker's log
        raise Problem(f"the worker did not come up: {str(error).splitlines()[-1]}") from error
    try:
        socket.create_connection((LOOPBACK, port), patient(TIMEOUT_S)).close()
    except OSError as error:
        raise Problem(f"the worker is up, and cannot be reached on {LOOPBACK}: {error}") from error
    return f"http://{LOOPBACK}:{port}"


def _http_sender(url: str, token: str) -> Sender:
    from transfer.trainer.senders.http import HttpSender

    return HttpSender(url, token, "worker 0", patient(TIMEOUT_S))


# --- Ray --------------------------------------------------------------------------------------------------------------


def _start_ray() -> None:
    import ray

    if ray.is_initialized():
        return
    set_environment()
    own = Path(tempfile.gettempdir())  # the doctor's, below the one that a run would use
    folder = own / "ray" if len(str(own / "ray")) <= SHORT_PATH else own.parent / "ray"
    ray.init(
        "local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        **QUIET,
        _temp_dir=str(folder),
    )


def _ray_worker(spec: PlainSpec) -> Sender:
    import ray

    from transfer.trainer.senders.ray import RaySender

    _start_ray()
    if RAY_ACTOR:
        try:
            ray.get(RAY_ACTOR[0].renew.remote(spec), timeout=patient(TIMEOUT_S))
        except ray.exceptions.RayActorError:
            RAY_ACTOR.clear()
    if not RAY_ACTOR:
        variables = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
        options = {"num_cpus": 0, "max_concurrency": 4, "runtime_env": {"env_vars": variables}}
        RAY_ACTOR.append(ray.remote(_renewable()).options(**options).remote(spec))
    ray.get(RAY_ACTOR[0].health.remote({}), timeout=patient(START_S))
    return RaySender(RAY_ACTOR[0], "worker 0", patient(TIMEOUT_S))


def _renewable() -> type:
    from transfer.worker.plain_worker import PlainWorker

    class RenewablePlainWorker(PlainWorker):
        """A plain worker that one actor can be several times, one after the other."""

        def renew(self, spec: PlainSpec) -> None:
            """Be another worker."""
            self.close()
            PlainWorker.__init__(self, spec)

    return RenewablePlainWorker
