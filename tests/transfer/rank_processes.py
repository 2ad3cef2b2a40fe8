"""Ranks of a trainer for the tests: forked processes in one gloo group, with FSDP2 shards of a tiny decoder, and the
HTTP worker that their first rank pushes to, which this process starts."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import transfer.trainer.ranks  # noqa: F401 - before processes are forked that need it
from transfer import make_receiver, make_transfer
from transfer.agreement.journal import Journal
from transfer.agreement.manifest import Manifest
from transfer.backends.buckets import Packer
from transfer.backends.collective_rows import CollectiveShards
from transfer.config import InFlight, TransferConfig
from transfer.trainer.senders.direct import DirectSender
from transfer.trainer.senders.http import HttpSender
from transfer.trainer.sources import full_weights
from transfer.worker.plain_worker import PlainSpec
from transfer.worker.process import WorkerProcess

ITSELF = -1  # a process's own id
FORK = multiprocessing.get_context("fork")
DEADLINE_S = 60.0


class Layer(torch.nn.Module):
    """A decoder layer's parameters, by Qwen3's names; of some there are fewer rows than ranks."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(hidden, hidden, bias=False)
        self.k_proj = torch.nn.Linear(hidden, 2, bias=True)
        self.q_norm = torch.nn.Parameter(torch.randn(1))
        self.down_proj = torch.nn.Linear(3 * hidden, hidden, bias=False)
        self.input_layernorm = torch.nn.Parameter(torch.randn(hidden))


class Decoder(torch.nn.Module):
    """A tiny decoder without a forward pass, with buffers of several kinds; equal seeds give equal weights."""

    def __init__(self, seed: int, tied: bool, dtype: torch.dtype = torch.float32, hidden: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = torch.nn.Embedding(11, hidden)
        self.layers = torch.nn.ModuleList(Layer(hidden) for _ in range(2))
        self.lm_head = torch.nn.Linear(hidden, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("steps", torch.tensor(seed))
        self.register_buffer("scales", torch.arange(7.0))
        self.register_buffer("empty", torch.empty(4, 0))
        self.to(dtype)


def trained(module: torch.nn.Module, steps: int = 1) -> None:
    """Gradient steps, as far as anybody can see: the same on shards and on whole tensors."""
    with torch.no_grad():
        for _ in range(steps):
            for parameter in module.parameters():
                parameter.mul_(1.5)


class Gloo:
    """transfer.Ranks by torch.distributed."""

    hosts = 1

    def __init__(self) -> None:
        self.number, self.count = dist.get_rank(), dist.get_world_size()

    def told(self, value: Any) -> Any:
        box = [json.dumps(value) if self.number == 0 else None]
        dist.broadcast_object_list(box, 0)
        return json.loads(box[0] or "")

    def gathered(self, value: Any) -> list[Any]:
        every: list[Any] = [None] * self.count
        dist.all_gather_object(every, json.dumps(value))
        return [json.loads(each) for each in every]


class Rank:
    """What one rank does, a method a command of the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ranks = Gloo()
        self._transfer: Any = None
        self._senders: list[HttpSender] = []
        self.weights: dict[str, torch.Tensor] = {}

    def build(self, sharded: bool, device: str = "cpu", hosts: int = 1, **dials: Any) -> None:
        """On the host, or each rank on a GPU of its own; the ranks of each of `hosts` hold all rows."""
        self.module = Decoder(**dials)
        self._ranks.hosts = hosts
        if device == "cuda":
            torch.cuda.set_device(self._ranks.number)
            self.module.cuda()
        if sharded:
            shape = (hosts, self._ranks.count // hosts)[hosts == 1 :]
            mesh = init_device_mesh(device, shape, mesh_dim_names=("h", "r")[hosts == 1 :])
            for layer in self.module.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.module, mesh=mesh)
        self.weights = self.module.state_dict()

    def say_hosts(self, hosts: int) -> None:
        """Be ranks of so many hosts, whatever the weights are."""
        self._ranks.hosts = hosts

    def make(self, config: TransferConfig) -> dict[str, Any]:
        journal = Journal(self._folder / "journal" / "trainer.jsonl") if self._ranks.number == 0 else None
        self._transfer = make_transfer(config, self._folder, InFlight.wait, journal, self._ranks)
        return dict(self._transfer.endpoint)

    def open(self, url: str, timeout_s: float = 20.0) -> None:
        """With workers at these addresses, one behind the other."""
        urls = url.split() if self._ranks.number == 0 else []
        self._senders = [HttpSender(each, None, f"worker {n}", timeout_s) for n, each in enumerate(urls)]
        self._transfer.open(self.weights, self._senders)

    def open_here(self) -> None:
        """With a receiver in the first rank's process."""
        senders = []
        if self._ranks.number == 0:
            self.received = Decoder(99, tied=False)
            self._receiver = make_receiver(self._transfer.endpoint, self.received)
            senders = [DirectSender(self._receiver, "worker 0")]
        self._transfer.open(self.weights, senders)

    def buckets_of(self, size: int) -> None:
        """From now on a broadcast is sent in buckets of so many bytes."""
        if self._ranks.number == 0:
            self._transfer._session._publisher._size = size

    def sums_instead(self) -> None:
        """From now on the digest is the one that shards on GPUs have."""
        if self._ranks.number == 0:
            self._transfer._session._publisher._on_gpus = True

    def harm(self, rank: int, during: str, after: int = 3, pid: int = 0, sleep_s: float = 0.0) -> None:
        """Once, while a rank sends `_say_rows` or a `broadcast` of its shares: kill `pid`, or sleep, or else raise."""
        if self._ranks.number != rank:
            return
        send, pack = getattr(CollectiveShards, during), Packer.pack

        def harmed(shards: CollectiveShards, *arguments: Any) -> Any:
            left = iter(range(after))

            def packed(*given: Any) -> None:
                if next(left, None) is None:
                    Packer.pack = pack  # type: ignore[method-assign]
                    _harm(os.getpid() if pid == ITSELF else pid, sleep_s)
                pack(*given)

            setattr(CollectiveShards, during, send)
            Packer.pack = packed  # type: ignore[method-assign]
            return send(shards, *arguments)

        setattr(CollectiveShards, during, harmed)

    def held(self) -> tuple[int, int]:
        """This process's descriptors and threads."""
        process = psutil.Process()
        return process.num_fds(), process.num_threads()

    def differing(self) -> list[str]:
        """Whose values the receiver has not to the bit, as the first rank sees it."""
        whole = full_weights(self.weights)
        there = self.received.state_dict() if self._ranks.number == 0 else whole
        return [name for name, tensor in whole.items() if not torch.equal(tensor, there[name])]

    def control_bytes(self) -> float:
        """Of all messages of the last push."""
        return self._transfer.last.numbers()["control_bytes"]

    def push(self) -> tuple[int, int, int]:
        return self._transfer.push(self.weights), self._transfer.epoch, self._transfer.last.bytes

    def train(self) -> None:
        trained(self.module)

    def spoil(self, rank: int, name: str) -> None:
        """NaN among the rows of one rank alone."""
        if self._ranks.number == rank:
            self.weights[name].to_local().view(-1)[0] = torch.nan  # type: ignore[attr-defined]

    def forget(self, rank: int, name: str) -> None:
        """One rank has other names than the others."""
        if self._ranks.number == rank:
            del self.weights[name]

    def withdraw(self) -> None:
        self._transfer.withdraw()

    def recover(self, url: str) -> bool:
        """By the first rank alone, of a worker that is at another address since it was started again."""
        sender = self._senders[0]
        sender.close()
        sender._move(url)
        return self._transfer.recover(sender)

    def rows(self, name: str) -> int:
        """How many this rank holds."""
        return len(self.weights[name].to_local())  # type: ignore[attr-defined]

    def close(self) -> None:
        self._transfer.close()


class Trainer:
    """The processes; `call` is a command to all of them."""

    def __init__(self, pipes: list[Any], processes: list[Any]) -> None:
        self.pipes, self.processes = pipes, processes

    def call(self, command: str, **arguments: Any) -> list[Any]:
        """What each rank gives; AssertionError with the errors, if any."""
        outcomes = self.outcomes(command, **arguments)
        assert all(kind == "gives" for kind, _ in outcomes), outcomes
        return [value for _, value in outcomes]

    def errors(self, command: str, **arguments: Any) -> list[str]:
        """What each rank raises, as `Type: text`."""
        outcomes = self.outcomes(command, **arguments)
        assert all(kind == "raises" for kind, _ in outcomes), outcomes
        return [value for _, value in outcomes]

    def outcomes(self, command: str, of: Any = None, **arguments: Any) -> list[Any]:
        """(gives, value), (raises, text) or (is gone, None) of each rank in `of`, or of all."""
        ranks = range(len(self.pipes)) if of is None else of
        for rank in ranks:
            self.begin(command, rank, **arguments)
        return [self.outcome(rank) for rank in ranks]

    def begin(self, command: str, rank: int, /, **arguments: Any) -> None:
        """Send a command to one rank alone."""
        with contextlib.suppress(OSError):
            self.pipes[rank].send((command, arguments))

    def outcome(self, rank: int) -> Any:
        """What came of the last command there."""
        try:
            return self.pipes[rank].recv() if self.pipes[rank].poll(DEADLINE_S) else ("hangs", None)
        except (EOFError, OSError):
            return "is gone", None

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGKILL)
        self.processes[rank].join()


@contextlib.contextmanager
def trainer(
    count: int,
    folder: Path,
    sharded: bool = True,
    device: str = "cpu",
    patience_s: float = DEADLINE_S / 2,
    **dials: Any,
) -> Iterator[Trainer]:
    """A trainer of so many ranks, each with a Decoder of these dials; its processes end with this.

    `patience_s`: for each other, and until gloo has noticed at the latest that one has just ended.
    """
    pairs = [FORK.Pipe() for _ in range(count)]
    ours = [pair[0] for pair in pairs]
    processes = [
        FORK.Process(target=_serve, args=(rank, count, (folder, device, patience_s), theirs, ours), daemon=True)
        for rank, (_, theirs) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    for _, theirs in pairs:
        theirs.close()
    made = Trainer(ours, processes)
    try:
        made.call("build", sharded=sharded, device=device, **dials)
        yield made
    finally:
        for pipe, process in zip(ours, processes, strict=True):
            pipe.close()
            process.join(5)
            process.kill()
            process.join()


def _harm(pid: int, sleep_s: float) -> None:
    if pid:
        os.kill(pid, signal.SIGKILL)
    elif sleep_s:
        time.sleep(sleep_s)
    else:
        raise RuntimeError("a fault of the test")


def _serve(rank: int, count: int, dials: tuple[Path, str, float], pipe: Any, others: list[Any]) -> None:
    for other in others:  # the test's ends
        other.close()
    torch.set_num_threads(1)
    folder, device, patience_s = dials
    rendezvous, backend = f"file://{folder}/store", "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    patience = timedelta(seconds=patience_s)
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=count, timeout=patience)
    state = Rank(folder)
    with contextlib.suppress(EOFError, OSError):
        while True:
            command, arguments = pipe.recv()
            try:
                said = "gives", getattr(state, command)(**arguments)
            except Exception as error:
                said = "raises", f"{type(error).__name__}: {error}"
            pipe.send(said)
    os._exit(0)


class Worker:
    """A plain worker behind HTTP for such a trainer."""

    def __init__(self, endpoint: dict[str, Any], folder: Path, manifest: Manifest, device: str = "cpu") -> None:
        journal = str(folder / "journal" / "worker.jsonl")
        spec = PlainSpec(manifest=manifest.to_json(), endpoint=endpoint, device=device, journal=journal)
        log = folder / "worker.log"
        self.process = WorkerProcess("worker 0", "transfer.worker.plain_worker", spec.to_json(), log, restarts=2)

    def __enter__(self) -> Worker:
        self.process.__enter__()
        self.connect()
        return self

    def __exit__(self, *exception: object) -> None:
        self._sender.close()
        self.process.__exit__(*exception)

    def connect(self) -> None:
        self.url = f"http://127.0.0.1:{self.process.port(time.monotonic() + DEADLINE_S)}"
        self._sender = HttpSender(self.url, None, "worker 0", 20.0)

    def restart(self) -> str:
        """Kill it and start it again: its new address."""
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.process.restarted()
        self._sender.close()
        self.connect()
        return self.url

    def serves(self) -> tuple[int, str]:
        """The version, and the digest of its live tensors."""
        said = self._sender.call("completions", {})
        return said["version"], said["digest"]

    def status(self) -> dict[str, Any]:
        return self._sender.call("status", {})
