"""The receiving process of the peers' ways: a module that each of them writes into, tensor by tensor, while it is live.

Told what to do through a pipe; two ways come as POSTs, which need the run's bearer token:

    /raw     the tensors' bytes one after the other
    /pickle  {"tensors": {name: base64 of torch.save}}
"""

from __future__ import annotations

import base64
import hmac
import io
import json
import os
import signal
import threading
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any

import torch

from transfer.agreement.manifest import Entry, Manifest
from transfer.bench.lab import START_S, TIMEOUT_S, reason
from transfer.bench.packing import buckets, packed, unpack
from transfer.memory.digest import digest_of
from transfer.memory.sums import as_bytes


class Holder:
    """The receiver's module: tensors by name."""

    def __init__(self, manifest: Mapping[str, Any], device: str = "cpu") -> None:
        torch.set_num_threads(1)
        self.device = torch.device(device)
        entries = Manifest.from_json(manifest).entries
        self.buckets = buckets(entries)  # as the sender has them
        zeros = ((e.name, torch.zeros(e.shape, dtype=e.torch_dtype, device=device)) for e in entries)
        self.weights = {name: tensor.clone() for name, tensor in zeros}  # touched once
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors in."""
        for name, tensor in tensors.items():
            self.weights[name].copy_(tensor)

    def unpack(self, index: int, buffer: torch.Tensor) -> None:
        """Copy in the tensors of one bucket."""
        unpack(buffer, self.weights, self.buckets[index])

    def synchronize(self) -> None:
        """Wait until all copies are done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def digest(self) -> str:
        """Of all bytes, in the manifest's order."""
        return digest_of(self.weights.values())


class RayHolder(Holder):
    """A Holder as a Ray actor, which is built and dropped again for each model."""

    def __init__(self) -> None:
        """Nothing yet."""

    def build(self, manifest: Mapping[str, Any]) -> None:
        """Hold the manifest's tensors."""
        super().__init__(manifest)

    def drop(self) -> None:
        """Give their memory back."""
        self.weights = {}

    def fetch(self, references: list[Any]) -> None:
        """Copy in what the one reference, {name: uint8 array}, refers to."""
        import ray

        arrays = ray.get(references[0], timeout=TIMEOUT_S)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            for name, tensor in self.weights.items():
                as_bytes(tensor).copy_(torch.from_numpy(arrays[name]))


class Server(ThreadingHTTPServer):
    """Writes what is POSTed into a Holder."""

    daemon_threads = True

    def __init__(self, holder: Holder, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.holder = holder
        self.expected = f"Bearer {token}".encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_POST(self) -> None:
        if not hmac.compare_digest((self.headers["Authorization"] or "").encode(), self.server.expected):
            self.close_connection = True
            return self._answer(401)
        if self.path == "/raw":
            for tensor in self.server.holder.weights.values():
                self._read_into(memoryview(as_bytes(tensor).numpy()))  # type: ignore[arg-type]
        else:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for name, text in body["tensors"].items():
                tensor = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
                self.server.holder.weights[name].copy_(tensor)
        return self._answer(200)

    def _read_into(self, target: memoryview) -> None:
        while len(target):
            count = self.rfile.readinto(target)  # type: ignore[attr-defined]
            if not count:
                raise ConnectionError("the body ends early")
            target = target[count:]

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


def serve(pipe: Connection, manifest: Mapping[str, Any], token: str, device: str) -> None:
    """Answer `(verb, argument)` with `(None, value)` or `(error, None)`, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the trainer
    holder = Holder(manifest, device)
    with Server(holder, token) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while True:
            try:
                verb, argument = pipe.recv()
            except EOFError:
                return
            answer: tuple[str | None, Any]
            try:
                answer = None, _done(holder, server, verb, argument)
                holder.synchronize()
            except Exception as error:
                answer = reason(error), None
            del argument  # the trainer's memory, where it is shared
            pipe.send(answer)


def _done(holder: Holder, server: Server, verb: str, argument: Any) -> Any:
    match verb:
        case "port":
            return server.server_address[1]
        case "digest":
            return holder.digest()
        case "tensors":
            return holder.load(argument)
        case "safetensors":
            from safetensors.torch import load_file

            return holder.load(load_file(argument))
        case "packed":
            return holder.unpack(*argument)
        case "join":
            backend, file = argument
            return join(backend, file, 1)
        case "broadcast":
            return broadcast(holder.weights)
        case "broadcast-packed":
            return receive_packed(holder)
    raise ValueError(f"unknown verb {verb}")


def join(backend: str, file: str, rank: int) -> None:
    """Become one of two in a process group that meets at `file`."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if backend == "nccl":
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # else a late peer ends the whole process
    torch.distributed.init_process_group(
        backend, init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=START_S)
    )


def broadcast(weights: Mapping[str, torch.Tensor]) -> None:
    """Send, or as rank 1 receive, all tensors, one after the other."""
    for tensor in weights.values():
        torch.distributed.broadcast(as_bytes(tensor), 0)


def send_packed(weights: Mapping[str, torch.Tensor], groups: Sequence[Sequence[Entry]]) -> None:
    """Send all tensors, packed into a buffer a group."""
    for group in groups:
        torch.distributed.broadcast(packed(weights, group), 0)


def receive_packed(holder: Holder) -> None:
    """As rank 1, receive what `send_packed` sends."""
    for group in holder.buckets:
        nbytes = sum(entry.nbytes for entry in group)
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=holder.device)
        torch.distributed.broadcast(buffer, 0)
        unpack(buffer, holder.weights, group)
