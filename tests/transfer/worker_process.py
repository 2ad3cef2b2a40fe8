"""Workers for the tests: a real Receiver, in this process or behind a pipe in its own, that can be told to fail."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from transfer import make_receiver, make_transfer
from transfer.agreement import wire
from transfer.agreement.manifest import Manifest
from transfer.trainer.senders.direct import DirectSender
from transfer.worker.plain_worker import Bag

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "numpy", "transfer.worker.receiver"])


class OddModel(torch.nn.Module):
    """Every kind of tensor that has to travel exactly: tied, odd-sized, 0-dim, empty, bool, int64, fp8, strided."""

    def __init__(self, seed: int, hidden: int = 5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = torch.nn.Parameter(torch.randn(7, hidden, generator=generator).to(dtype))
        self.head = self.embed  # tied
        self.scale = torch.nn.Parameter(torch.randn((), generator=generator).to(dtype))
        self.strided = torch.nn.Parameter(torch.randn(hidden, 3, generator=generator).to(dtype).t())
        self.register_buffer("mask", torch.rand(3, generator=generator) > 0.5)
        self.register_buffer("count", torch.randint(0, 2**40, (), generator=generator))
        self.register_buffer("empty", torch.empty(0, 4, dtype=torch.int64))
        self.register_buffer("codes", torch.randint(0, 127, (13,), generator=generator).to(torch.uint8))


class PlainModel(torch.nn.Module):
    """Parameters of one floating-point dtype."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, hidden: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(hidden, 7, dtype=dtype)
        self.second = torch.nn.Linear(7, 3, dtype=dtype)


class Float8Model(torch.nn.Module):
    """A module with an fp8 buffer between others."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("a", torch.randint(0, 9, (3,), generator=generator).to(torch.uint8))
        self.register_buffer("b", torch.randn(5, generator=generator).to(torch.float8_e4m3fn))
        self.register_buffer("c", torch.randn(2, 2, generator=generator))


def fingerprint(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """sha256 of every tensor's bytes, by name."""
    return {
        name: hashlib.sha256(w.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, w in weights.items()
    }


def on_gpu(seed: int) -> torch.nn.Module:
    """A PlainModel on the first GPU."""
    return PlainModel(seed).cuda()


def on_second_gpu(seed: int) -> torch.nn.Module:
    """A PlainModel on the second GPU."""
    return PlainModel(seed).to("cuda:1")


def bag(seed: int, manifest: dict[str, Any]) -> torch.nn.Module:
    """The tensors of a manifest, zero."""
    return Bag({e.name: torch.zeros(e.shape, dtype=e.torch_dtype) for e in Manifest.from_json(manifest).entries})


def plain(seed: int) -> dict[str, torch.Tensor]:
    """The weights of a PlainModel."""
    return PlainModel(seed).state_dict()


@contextlib.contextmanager
def in_process(config: Any, folder: Path, module: torch.nn.Module, weights: Any) -> Iterator[tuple[Any, Any]]:
    """An open session to a receiver in this process, and that receiver."""
    with make_transfer(config, folder) as transfer:
        receiver = make_receiver(transfer.endpoint, module)
        try:
            transfer.open(weights, [DirectSender(receiver, "worker 0")])
            yield transfer, receiver
        finally:
            receiver.close()


def _serve(connection: Any, endpoint: dict[str, Any], model: tuple[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    models = {
        "odd": OddModel,
        "plain": PlainModel,
        "float8": Float8Model,
        "on_gpu": on_gpu,
        "on_second_gpu": on_second_gpu,
        "bag": bag,
    }
    module = models[model[0]](**model[1])
    receiver = make_receiver(endpoint, module)
    stage = receiver._intake.stage

    def broken(version: int, where: Any) -> Any:
        staged = stage(version, where)
        if fault == "half":
            raise RuntimeError("a fault in the middle of staging")
        return staged

    receiver._intake.stage = broken  # type: ignore[method-assign]
    while True:
        try:
            number, verb, body, fault = connection.recv()
        except EOFError:
            receiver.close()
            return
        if fault == "die":
            os._exit(9)
        if fault == "deaf":
            continue
        answer = _answer(receiver, module, verb, body)
        if fault == "die after":
            os._exit(9)
        if fault != "mute":
            connection.send((number, answer))


def _answer(receiver: Any, module: torch.nn.Module, verb: str, body: Any) -> Any:
    if verb == "peek":
        descriptors = len(os.listdir("/proc/self/fd"))
        return {"version": receiver.version, "weights": fingerprint(module.state_dict()), "descriptors": descriptors}
    try:
        return getattr(receiver, verb)(body)
    except wire.Refused as error:
        return error


class PipeSender:
    """A Sender over the pipe; `faults[verb]` is what the worker does at its next call of that verb."""

    def __init__(self, start: Callable[[], tuple[Any, Any]], name: str) -> None:
        self.name = name
        self.may_restart = False
        self._start = start
        self._connection, self.process = start()
        self.faults: dict[str, str] = {}
        self.log: list[tuple[str, dict[str, Any]]] = []
        self._number = 0

    def call(self, verb: str, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        self.log.append((verb, dict(body)))
        self._number += 1
        try:
            self._connection.send((self._number, verb, dict(body), self.faults.pop(verb, None)))
            while self._connection.poll(timeout_s or 20.0):
                number, answer = self._connection.recv()
                if number == self._number:
                    if isinstance(answer, wire.Refused):
                        raise wire.RemoteError(self.name, verb, answer.status, answer.reason)
                    return answer
        except (OSError, EOFError) as error:
            raise wire.RemoteError(self.name, verb, 0, f"the worker is gone: {error!r}") from error
        raise wire.RemoteError(self.name, verb, 0, f"no answer within {timeout_s} s")

    def peek(self) -> dict[str, Any]:
        return self.call("peek", {})

    def restart(self) -> bool:
        if self.may_restart:
            self.process.join(1)
        if not self.may_restart or self.process.is_alive():
            return False
        self.close()
        self._connection, self.process = self._start()
        return True

    def close(self) -> None:
        self._connection.close()
        self.process.join(20)
        self.process.kill()
        self.process.join()
        self.process.close()


@contextlib.contextmanager
def worker_processes(
    endpoint: Mapping[str, Any], model: str, count: int = 1, **dials: Any
) -> Iterator[list[PipeSender]]:
    """Senders to `count` worker processes, whose models are made from `dials`."""

    def start() -> tuple[Any, Any]:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_serve, args=(theirs, dict(endpoint), (model, dials)), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(PipeSender(start, f"worker {i}"))) for i in range(count)]
