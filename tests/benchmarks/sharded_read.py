"""What a worker's read of sharded weights costs: rows of W ranks straight into its parameters; in one run with the
limit and with the usual way.

python tests/benchmarks/sharded_read.py [SHAPE ...]      512mb by default; shapes as transfer.bench names them; on a CPU

    read        from all ranks' slots into the worker's module, as an update does (bar: 1.15x memcpy)
    memcpy      as many bytes from one block to another
    write       each rank's rows into its slot, and the search for NaN
    gather      full_tensor() of every parameter, by all ranks, each then broadcast by the first to the worker
                (bar: 5x the read)

All ways alternate within a round; numbers are medians, in ms. What the worker holds is compared with the truth.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from transfer.agreement.manifest import Manifest
from transfer.agreement.shards import local, rows_of
from transfer.backends.arena import ArenaIntake
from transfer.backends.shards import Shards
from transfer.bench.shapes import model_named
from transfer.worker.landing import Landing

ROUNDS = 9
PAIRS = 3  # of a read and a memcpy, in a round
RANKS = (2, 4)
FORK = multiprocessing.get_context("fork")


def main(shapes: list[str]) -> None:
    """Print a line for each model and number of ranks."""
    torch.set_num_threads(1)
    for shape in shapes:
        tensors = model_named(shape).tensors
        manifest = Manifest.of(
            {name: torch.empty(size, dtype=getattr(torch, d)) for name, (d, size) in tensors.items()}
        )
        for count in RANKS:
            print(
                f"{shape}, {manifest.nbytes / 1e6:.0f} MB, {len(manifest.entries)} tensors, {count} ranks:", flush=True
            )
            worker = FORK.Process(target=measure, args=(manifest, count))  # a process that has had a group forks none
            worker.start()
            worker.join()


def measure(manifest: Manifest, count: int) -> None:
    """Time all ways, as the worker; print the medians."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(count):
            ours, theirs = FORK.Pipe()
            processes.append(FORK.Process(target=serve, args=(rank, count, manifest, folder, theirs)))
            processes[-1].start()
            pipes.append(ours)
        join(folder, count, count)
        sockets = [pipe.recv() for pipe in pipes]
        held = {entry.name: torch.zeros(entry.shape, dtype=entry.torch_dtype) for entry in manifest.entries}
        ways = the_ways(manifest, pipes, sockets, held)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range(ROUNDS + 1):  # the first is not counted: there it is seen whether the bytes are right
            for name in ("write", *("read", "memcpy") * PAIRS, "gather"):
                taken[name].append(ways[name]())
                if round_ == 0 and name in ("read", "gather"):
                    check(manifest, held)
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send("end")
            process.join()
    pairs = zip(taken["read"][PAIRS:], taken["memcpy"][PAIRS:], strict=True)
    to_memcpy = statistics.median(read / memcpy for read, memcpy in pairs)
    medians = {name: statistics.median(seconds[len(seconds) // (ROUNDS + 1) :]) for name, seconds in taken.items()}
    line = ", ".join(f"{name} {1e3 * each:.1f}" for name, each in medians.items())
    faster = medians["gather"] / medians["read"]
    print(f"  {line} ms; read / memcpy {to_memcpy:.2f}, gather / read {faster:.1f}", flush=True)


def the_ways(manifest: Manifest, pipes: list[Any], sockets: list[str], held: Any) -> dict[str, Callable[[], float]]:
    """Each way as a call that gives its seconds."""
    endpoint = {"backend": "ipc", "staging": "arena", "take": "copy", "socket": sockets[0], "sockets": sockets}
    intake, landing = ArenaIntake(endpoint), Landing(manifest, held)
    intake.prepare(manifest, {"slots": 2, "ranks": len(pipes)}, torch.device("cpu"))
    staged = intake.stage(0, {"slot": 0})
    source, target = torch.randint(0, 255, (2, manifest.nbytes), dtype=torch.uint8)

    def of_ranks(command: str) -> float:
        for pipe in pipes:
            pipe.send(command)
        return max(pipe.recv() for pipe in pipes)

    def gather() -> float:
        for pipe in pipes:
            pipe.send("gather")
        seconds = timed(lambda: [dist.broadcast(held[entry.name], 0, PAIR[0]) for entry in manifest.entries])
        return max([seconds, *(pipe.recv() for pipe in pipes)])

    return {
        "write": lambda: of_ranks("write"),
        "read": lambda: timed(lambda: landing.copy(staged, False, False)),
        "memcpy": lambda: timed(lambda: target.copy_(source)),
        "gather": gather,
    }


def serve(rank: int, count: int, manifest: Manifest, folder: str, pipe: Any) -> None:
    """One rank of the trainer."""
    torch.set_num_threads(1)
    mesh = join(folder, rank, count)
    shards, layout = Shards(rank, count), local(manifest, count, rank)
    weights = {}
    for entry, mine in zip(manifest.entries, layout.entries, strict=True):
        first, _ = rows_of(entry.shape[0], count, rank)
        rows = values(entry.shape)[first : first + mine.shape[0]].to(entry.torch_dtype).clone()
        weights[entry.name] = DTensor.from_local(rows, mesh, [Shard(0)], shape=entry.shape, stride=stride(entry.shape))
    shards.carry_out({"do": "prepare", "manifest": manifest.to_json(), "slots": 2, "whole": []}, weights)
    pipe.send(shards.socket)
    while (command := pipe.recv()) != "end":
        if command == "write":
            pipe.send(timed(lambda: shards.carry_out({"do": "write", "slot": 0}, weights)))
        else:
            pipe.send(timed(lambda: gathered(rank, manifest, weights)))
    os._exit(0)


def gathered(rank: int, manifest: Manifest, weights: dict[str, Any]) -> None:
    for entry in manifest.entries:
        whole = weights[entry.name].full_tensor()
        if rank == 0:
            dist.broadcast(whole, 0, PAIR[0])


PAIR: list[Any] = []  # the group of the first rank and the worker


def join(folder: str, number: int, count: int) -> DeviceMesh:
    """Meet the other processes, the worker as the last; the mesh of the ranks."""
    PAIR.clear()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=count + 1)
    mesh = DeviceMesh("cpu", list(range(count)))
    PAIR.append(dist.new_group([0, count]))
    return mesh


def values(shape: tuple[int, ...]) -> torch.Tensor:
    """What a tensor of this shape holds, whoever asks."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 251).view(shape)


def check(manifest: Manifest, held: dict[str, torch.Tensor]) -> None:
    for entry in manifest.entries:
        assert torch.equal(held[entry.name], values(entry.shape).to(entry.torch_dtype)), entry.name
        held[entry.name].zero_()


def stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main(sys.argv[1:] or ["512mb"])
