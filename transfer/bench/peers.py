"""The peers' ways, as fast as their means allow: connections are kept, and only the way's own copies are made."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from transfer.agreement.wire import TOKEN_VARIABLE
from transfer.bench.forked import Forked
from transfer.bench.lab import START_S, TIMEOUT_S, Lab, Unavailable
from transfer.bench.ours import http_worker, ray_worker
from transfer.bench.peer_worker import RayHolder, broadcast, join, serve
from transfer.bench.relay import Relay
from transfer.bench.source import Source
from transfer.bench.ways import Connect, Control, Parts, Unit, Way
from transfer.engine.ipc import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine
from transfer.memory.sums import as_bytes
from transfer.trainer.interfaces import Sender
from transfer.trainer.senders.http import HttpSender
from transfer.trainer.senders.ray import RaySender

SHM = "/dev/shm"
FOLDER = "transfer-bench-"  # begins the names of folders there; the process's number follows
STALE_S = 3600.0
ALONE = {"backend": "local"}  # the endpoint of a worker that no session feeds
BUCKET_BYTES = 64 * 10**6  # of tensors in one body of `pickle-http`
IN_PIPE = ("torch-shared", "torch-shared-fresh", "raw-http", "pickle-http", "gloo-by-tensor", "safetensors-shm")


def units(lab: Lab, names: Collection[str]) -> list[Unit]:
    """What must be started for these ways, with the memory in bytes of the model."""
    in_pipe = [name for name in names if name in IN_PIPE]
    made = [Unit(in_pipe, 2.0, 2.0, partial(_pipe, lab, in_pipe))] if in_pipe else []
    others = {
        "one-shot-http": (1.0, 2.0, _one_shot_http),
        "one-shot-ray": (1.0, 2.0, _one_shot_ray),
        "ray-store": (3.0, 0.0, _ray_store),
    }
    return made + [Unit([n], *others[n][:2], partial(others[n][2], lab)) for n in names if n in others]


class PeerWay:
    """A way made of its parts: how to send, and how to ask for the digest of what was received."""

    def __init__(self, name: str, source: Source, send: Callable[[], None], held: Callable[[], str]) -> None:
        self.name = name
        self._source = source
        self.send = send
        self.held = held

    def change(self) -> str:
        """Change the trainer's weights; their digest."""
        self._source.change()
        return self._source.digest()

    def prepare(self, counted: bool) -> None:
        """Nothing."""

    def parts(self) -> Parts:
        """Only the whole is known."""
        return Parts()

    def plan(self) -> str:
        """Not asked for."""
        return ""

    def control(self) -> Control:
        """Not to be told from the weights."""
        return Control()


# --- the one-shot API -------------------------------------------------------------------------------------------------


class OneShotWay(PeerWay):
    """trainer_send_weights to a worker of ours, which says how long it could not serve."""

    def __init__(self, name: str, source: Source, sender: Sender, target: Callable[[bool], dict[str, Any]]) -> None:
        super().__init__(name, source, self._send, lambda: sender.call("completions", {})["digest"])
        self._sender = sender
        self._target = target
        self._arguments: dict[str, Any] = {}
        self.relay: Relay | None = None
        self._counted = 0

    def prepare(self, counted: bool) -> None:
        """Choose the address."""
        self._arguments = self._target(counted)

    def _send(self) -> None:
        before = self.relay.bytes if self.relay else 0
        arguments = IPCTrainerSendWeightsArgs(**self._arguments)
        IPCWeightTransferEngine.trainer_send_weights(iter(self._source.weights.items()), arguments)
        self._counted = self.relay.bytes - before if self.relay else 0

    def parts(self) -> Parts:
        """The flip, as the worker timed it."""
        return Parts(flip=self._sender.call("status", {})["flip_seconds"])

    def plan(self) -> str:
        """A copy of each tensor, once more."""
        return ""

    def control(self) -> Control:
        """What went through the relay, if it was taken."""
        return Control(wire=self._counted or None)


@contextmanager
def _one_shot_http(lab: Lab) -> Iterator[Connect]:
    with ExitStack() as stack:
        process = stack.enter_context(http_worker(lab, "one-shot-http", ALONE))
        stack.enter_context(_variable(TOKEN_VARIABLE, lab.token))

        def connect() -> list[Way]:
            url = process.url()
            lab.ready()
            relay = stack.enter_context(Relay(url))
            sender = stack.enter_context(closing(HttpSender(url, lab.token, "one-shot-http", TIMEOUT_S)))
            urls = {False: url, True: relay.url}
            way = OneShotWay("one-shot-http", lab.source, sender, lambda c: {"mode": "http", "url": urls[c]})
            way.relay = relay
            return [way]

        yield connect


@contextmanager
def _one_shot_ray(lab: Lab) -> Iterator[Connect]:
    with ray_worker(lab, ALONE) as built:

        def connect() -> list[Way]:
            actor = built()
            lab.ready()
            sender = RaySender(actor, "one-shot-ray", TIMEOUT_S)
            target = {"mode": "ray", "llm_handle": actor}
            return [OneShotWay("one-shot-ray", lab.source, sender, lambda counted: target)]

        yield connect


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


# --- Ray's object store -----------------------------------------------------------------------------------------------


@contextmanager
def _ray_store(lab: Lab) -> Iterator[Connect]:
    if lab.ray is None:
        raise Unavailable("no Ray was started")
    if 2 * lab.nbytes > lab.ray.store_bytes:
        raise Unavailable(f"two versions do not fit into an object store of {lab.ray.store_bytes / 1e9:.1f} GB")
    with lab.ray.actor(RayHolder, lab.source.manifest.to_json()) as built:

        def connect() -> list[Way]:
            actor = built()
            return [PeerWay("ray-store", lab.source, partial(_put, lab.source, actor), partial(_held, actor))]

        yield connect


def _put(source: Source, actor: Any) -> None:
    import ray

    arrays = {name: as_bytes(tensor).numpy() for name, tensor in source.weights.items()}
    ray.get(actor.fetch.remote([ray.put(arrays)]), timeout=TIMEOUT_S)


def _held(actor: Any) -> str:
    import ray

    return ray.get(actor.digest.remote(), timeout=TIMEOUT_S)


# --- one process at the other end of a pipe ---------------------------------------------------------------------------


class Peer(Forked):
    """The receiving process; Unavailable with its error, or after the deadline."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(serve, lab.source.manifest.to_json(), lab.token, lab.receiver)

    def tell(self, verb: str, argument: Any = None) -> None:
        """Send one command."""
        try:
            self.pipe.send((verb, argument))
        except OSError as error:
            raise Unavailable(f"the receiving process is gone ({error})") from None

    def hear(self, timeout_s: float = TIMEOUT_S) -> Any:
        """The answer to the oldest command."""
        try:
            if not self.pipe.poll(timeout_s):
                self.pipe.close()  # a late answer would be taken for another one
                raise Unavailable(f"the receiving process did not answer within {timeout_s:g} s")
            error, value = self.pipe.recv()
        except (EOFError, OSError):
            raise Unavailable("the receiving process is gone") from None
        if error is not None:
            raise Unavailable(error)
        return value

    def ask(self, verb: str, argument: Any = None) -> Any:
        """Send one command and wait for its answer."""
        self.tell(verb, argument)
        return self.hear()


@contextmanager
def _pipe(lab: Lab, names: list[str]) -> Iterator[Connect]:
    with ExitStack() as stack:
        peer = stack.enter_context(Peer(lab))

        def connect() -> list[Way]:
            peer.tell("port")
            port = peer.hear(START_S)
            kept = stack.enter_context(closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)))
            shared = lab.source.copy() if "torch-shared" in names else lab.source  # torch moves them to /dev/shm
            sends = {
                "torch-shared": lambda: peer.ask("tensors", shared.weights),
                "torch-shared-fresh": lambda: peer.ask(
                    "tensors", {n: t.clone() for n, t in lab.source.weights.items()}
                ),
                "raw-http": lambda: _post(kept, "/raw", lab.token, _pieces(lab.source), lab.nbytes),
                "pickle-http": lambda: _post_pickled(kept, lab.token, lab.source.weights),
                "gloo-by-tensor": _gloo(lab, peer, stack),
                "safetensors-shm": _safetensors(peer, lab.source, stack),
            }
            sources = {"torch-shared": shared}
            held = partial(peer.ask, "digest")
            return [PeerWay(name, sources.get(name, lab.source), sends[name], held) for name in names]

        yield connect


def _post(connection: http.client.HTTPConnection, path: str, token: str, body: Any, nbytes: int) -> None:
    headers = {"Authorization": f"Bearer {token}", "Content-Length": str(nbytes)}
    try:
        connection.request("POST", path, body, headers)
        with connection.getresponse() as answer:
            answer.read()
    except Exception:
        connection.close()  # the next request opens it again
        raise
    if answer.status != 200:
        raise Unavailable(f"the receiving process answered {answer.status}")


def _pieces(source: Source) -> Iterator[memoryview]:
    for entry in source.manifest.entries:
        yield memoryview(as_bytes(source.weights[entry.name]).numpy())  # type: ignore[arg-type]


def _post_pickled(connection: http.client.HTTPConnection, token: str, weights: Mapping[str, torch.Tensor]) -> None:
    bucket: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if bucket and sum(t.nbytes for t in bucket.values()) + tensor.nbytes > BUCKET_BYTES:
            body = _pickled(bucket)
            _post(connection, "/pickle", token, body, len(body))
            bucket = {}
        bucket[name] = tensor
    body = _pickled(bucket)
    _post(connection, "/pickle", token, body, len(body))


def _pickled(tensors: Mapping[str, torch.Tensor]) -> bytes:
    texts = {}
    for name, tensor in tensors.items():
        file = io.BytesIO()
        torch.save(tensor, file)
        texts[name] = base64.b64encode(file.getbuffer()).decode()
    return json.dumps({"tensors": texts}).encode()


def _gloo(lab: Lab, peer: Peer, stack: ExitStack) -> Callable[[], None]:
    weights = {entry.name: lab.source.weights[entry.name] for entry in lab.source.manifest.entries}
    file = str(lab.folder / "gloo")

    def both(verb: str, argument: Any, ours: Callable[[], None]) -> None:
        peer.tell(verb, argument)
        try:
            ours()
        finally:
            peer.hear()

    def send() -> None:
        if not torch.distributed.is_initialized():
            both("join", ("gloo", file), partial(join, "gloo", file, rank=0))
            stack.callback(torch.distributed.destroy_process_group)
        both("broadcast", None, partial(broadcast, weights))

    return send


def _safetensors(peer: Peer, source: Source, stack: ExitStack) -> Callable[[], None]:
    from safetensors.torch import save_file

    folders: list[str] = []

    def send() -> None:
        if not folders:
            remove_left(Path(SHM))
            folders.append(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{FOLDER}{os.getpid()}-", dir=SHM)))
        path = f"{folders[0]}/weights.safetensors"
        save_file(source.weights, path)
        peer.ask("safetensors", path)

    return send


def remove_left(shared: Path) -> None:
    """Remove what benchmarks have left that were killed: of an hour ago or more, and of no process that lives."""
    for left in shared.glob(f"{FOLDER}*-*"):
        with suppress(OSError, ValueError):
            lives = Path("/proc", str(int(left.name.removeprefix(FOLDER).partition("-")[0]))).exists()
            if not lives and time.time() - left.stat().st_mtime > STALE_S:
                shutil.rmtree(left)
