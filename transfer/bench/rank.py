"""One rank of a trainer whose weights are sharded: it writes its rows for pushes, and gathers them as others do."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from transfer import make_transfer
from transfer.agreement.manifest import Entry, Manifest
from transfer.agreement.shards import rows_of
from transfer.bench.lab import TIMEOUT_S
from transfer.bench.tensor_parallel import part_of
from transfer.config import InFlight, IpcConfig, SenderConfig, Take, Verify
from transfer.memory.digest import digest_of
from transfer.trainer.interfaces import Sender, Transfer
from transfer.trainer.senders.http import HttpSender

LIMIT_ROUNDS = 5
FAR = "copy of the other ranks' rows to the first GPU"


class PipedRanks:
    """The ranks as a transfer sees them: the first has a pipe to each other, which have one to it."""

    hosts = 1

    def __init__(self, number: int, count: int, pipes: Sequence[Connection]) -> None:
        self.number, self.count = number, count
        self._pipes = pipes

    def told(self, value: Any) -> Any:
        """What the first says."""
        if self.number:
            return json.loads(self._pipes[0].recv_bytes())
        said = json.dumps(value).encode()
        for pipe in self._pipes:
            pipe.send_bytes(said)
        return value

    def gathered(self, value: Any) -> list[Any]:
        """What each says."""
        if self.number:
            self._pipes[0].send_bytes(json.dumps(value).encode())
            return list(self.told(None))
        return list(self.told([value, *(json.loads(pipe.recv_bytes()) for pipe in self._pipes)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a rank's process must know."""

    rank: int
    count: int
    folder: str
    manifest: dict[str, Any]
    on_gpu: bool


def serve_rank(pipe: Connection, told: Told, pipes: Sequence[Connection]) -> None:
    """Do what the pipe asks for until it is closed: (command, arguments), answered by what that gives or raises."""
    torch.set_num_threads(1)
    rank, on_gpu = told.rank, told.on_gpu
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=f"file://{told.folder}/store",
        rank=rank,
        world_size=told.count,
        timeout=timedelta(seconds=TIMEOUT_S),
        device_id=device if on_gpu else None,
    )
    of_rank = Rank(Manifest.from_json(told.manifest), device, Path(told.folder), PipedRanks(rank, told.count, pipes))
    while True:
        try:
            command, arguments = pipe.recv()
        except EOFError:
            os._exit(0)  # whatever others of the group do
        try:
            pipe.send((True, getattr(of_rank, command)(**arguments)))
        except Exception as error:
            pipe.send((False, f"rank {rank}: {type(error).__name__}: {error}"))


class Rank:
    """fp32 shards of a model, values at least 1 and below 2 but for their sign, and the ways to move them."""

    def __init__(self, manifest: Manifest, device: torch.device, folder: Path, ranks: PipedRanks) -> None:
        self._manifest, self._device, self._folder, self._ranks = manifest, device, folder, ranks
        mesh = DeviceMesh(device.type, list(range(self._ranks.count)))
        self._weights: dict[str, DTensor] = {}
        for entry in manifest.entries:
            first, end = rows_of(entry.shape[0], self._ranks.count, self._ranks.number)
            rows = _values(entry.shape, first, end, device)
            stride = torch.empty(entry.shape, device="meta").stride()
            placed = DTensor.from_local(
                rows, mesh, [Shard(0)], run_check=False, shape=torch.Size(entry.shape), stride=stride
            )
            self._weights |= dict.fromkeys(entry.names, placed)
        self._shards = list({id(each): each.to_local() for each in self._weights.values()}.values())
        self._transfer: Transfer | None = None

    def make(self, verify: str) -> Any:
        """A transfer to other receivers; its endpoint."""
        self.close()
        sender = SenderConfig(timeout_s=TIMEOUT_S)
        config = IpcConfig(sender=sender, take=Take.copy, verify=Verify(verify))
        self._transfer = make_transfer(config, self._folder, InFlight.wait, ranks=self._ranks)
        return dict(self._transfer.endpoint)

    def open(self, urls: list[str], token: str) -> None:
        """Agree with the workers."""
        senders: list[Sender] = []
        if self._ranks.number == 0:
            senders = [HttpSender(url, token, f"worker {index}", TIMEOUT_S) for index, url in enumerate(urls)]
        assert self._transfer is not None
        self._transfer.open(cast("Any", self._weights), senders)

    def push(self) -> dict[str, float]:
        """Change all values, and push them; seconds of all, and until all rows were written."""
        assert self._transfer is not None
        torch._foreach_neg_(self._shards)
        self._synchronize()
        self._ranks.gathered(None)  # all begin at once
        seconds = _timed(lambda: self._transfer.push(cast("Any", self._weights)))  # type: ignore[union-attr]
        return {"push": seconds, "write": self._transfer.last.write_seconds}

    def close(self) -> None:
        """End the transfer."""
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None

    @torch.no_grad()
    def gather(self) -> float:
        """Seconds of the usual way: full_tensor() of every parameter in the dtype that travels, and a broadcast."""

        def work() -> None:
            for entry in self._manifest.entries:
                whole = self._whole(entry)
                dist.broadcast(whole, 0)
            self._synchronize()

        self._ranks.gathered(None)  # all begin at once
        return _timed(work)

    @torch.no_grad()
    def truth(self, size: int) -> str:
        """The digests of what `size` tensor-parallel ranks must hold, or of all for 1, by gathering."""
        held: list[list[torch.Tensor]] = [[] for _ in range(size)]
        for entry in self._manifest.entries:
            whole = self._whole(entry)
            for rank, parts in enumerate(held):
                if self._ranks.number == 0:
                    parts.append(part_of(entry.name, whole, rank, size).clone())
        return " ".join(digest_of(parts) for parts in held) if self._ranks.number == 0 else ""

    def _whole(self, entry: Entry) -> torch.Tensor:
        whole: torch.Tensor = cast("Any", self._weights[entry.name].to(entry.torch_dtype)).full_tensor()
        return whole

    def limits(self) -> dict[str, float]:
        """Seconds of copies on GPUs: of all bytes within one, of another's rows to the first, and of half of all."""
        nbytes, count = self._manifest.nbytes, self._ranks.count
        if self._ranks.number or self._device.type != "cuda":
            return {}
        target = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        here = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        far = nbytes * (count - 1) // count
        there = torch.empty(far, dtype=torch.uint8, device=torch.device("cuda", 1))
        half = nbytes // 2
        return {
            "copy of all within one GPU": self._median(lambda: target.copy_(here)),
            FAR: self._median(lambda: target[:far].copy_(there)),
            "copy of half of all within one GPU": self._median(lambda: target[:half].copy_(here[:half])),
        }

    def _median(self, work: Callable[[], Any]) -> float:
        def whole() -> None:
            work()
            self._synchronize()

        whole()
        return statistics.median(_timed(whole) for _ in range(LIMIT_ROUNDS))

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _values(shape: tuple[int, ...], first: int, end: int, device: torch.device) -> torch.Tensor:
    """Rows of a tensor, fp32, of which the dtypes that travel hold every value."""
    width = torch.Size(shape[1:]).numel()
    numbers = torch.arange(first * width, end * width, dtype=torch.int32, device=device)
    return numbers.remainder_(127).div(128).add_(1).view(end - first, *shape[1:])


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
