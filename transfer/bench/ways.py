"""What there is to be timed, by name; no torch in here, so that a wrong name is refused at once.

Ours are called `<backend>-[<staging>-<take>-]<verify>-<sender>`, the peers' by what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from transfer.bench.shapes import BenchError

SENDERS = ("http", "ray")
CPU, CUDA = "cpu", "cuda"  # where the weights are
CHANNELS = {  # of our own, by where the weights are
    CPU: ("ipc-arena-view", "ipc-arena-copy", "ipc-live-copy", "ipc-live-view", "gloo", "disk"),
    CUDA: ("ipc-arena-view", "ipc-arena-copy", "ipc-live-copy", "ipc-live-view", "nccl"),
}
FLAT, BY_TENSOR = "memcpy", "memcpy-by-tensor"
LIMITS = {
    CPU: {
        FLAT: "all bytes in one piece, into memory touched before: the limit",
        BY_TENSOR: "a piece a tensor",
    },
    CUDA: {
        FLAT: "one cudaMemcpyAsync of all bytes to the receiver's GPU, synchronised: the limit",
        BY_TENSOR: "one cudaMemcpyAsync a tensor",
    },
}

CPU_PEERS = {
    "one-shot-http": "trainer_send_weights, over HTTP: a copy in fresh shared memory, handles of all tensors",
    "one-shot-ray": "trainer_send_weights, over Ray",
    "torch-shared": "torch.multiprocessing: the trainer's tensors stay in shared memory, handles are sent anew",
    "torch-shared-fresh": "torch.multiprocessing: copies in fresh shared memory",
    "ray-store": "ray.put, ray.get in the actor, a copy into the module",
    "raw-http": "the bytes as the body of a POST, read into the module's memory",
    "pickle-http": "torch.save and base64 of each tensor in JSON, a POST each 64 MB",
    "gloo-by-tensor": "torch.distributed.broadcast a tensor, TCP over loopback",
    "safetensors-shm": "save_file to /dev/shm, load_file, a copy into the module",
}
NCCL = {
    "nccl-by-tensor": "torch.distributed.broadcast a tensor, NCCL",
    "nccl-packed": "torch.distributed.broadcast of buffers of 1 GiB, packed by torch.cat, NCCL",
}
CUDA_PEERS = {
    "handle-by-tensor": "a CUDA IPC handle a tensor, made anew, over a pipe; opened, copied into the module",
    "handle-packed": "torch.cat into buffers of 1 GiB, a handle each over a pipe; split and copied into the module",
    "one-shot-http": "trainer_send_weights, over HTTP: handles of all tensors, a copy aside, then into the module",
    "one-shot-ray": "trainer_send_weights, over Ray",
    **NCCL,
}
PEERS = {CPU: CPU_PEERS, CUDA: CUDA_PEERS}


def our_names(senders: Collection[str] = SENDERS, device: str = CPU) -> list[str]:
    """Our own ways with these senders; `verify=full` only for what `transfer=ipc` is on a CPU."""
    names = []
    for sender in senders:
        for channel in CHANNELS[device]:
            if channel != "disk":  # which compares the file's hash in any case
                names.append(f"{channel}-off-{sender}")
            names.append(f"{channel}-digest-{sender}")
            if (channel, sender, device) == ("ipc-arena-view", "http", CPU):
                names.append(f"{channel}-full-{sender}")
    return names


def selected(senders: Collection[str], only: Sequence[str], skip: Sequence[str], device: str = CPU) -> list[str]:
    """The ways whose name contains one of `only`, if there are any, and none of `skip`; BenchError if that is none."""
    every = [*our_names(device=device), *PEERS[device]]
    for option, texts in (("--only", only), ("--skip", skip)):
        for text in texts:
            if not any(text in name for name in every):
                raise BenchError(f"{option} {text!r} is part of no way's name: {', '.join(every)}")
    names = [name for name in every if "http" in senders or not name.endswith("-http")]
    names = [name for name in names if "ray" in senders or "ray" not in name.split("-")]
    names = [name for name in names if not only or any(text in name for text in only)]
    names = [name for name in names if not any(text in name for text in skip)]
    if not names:
        raise BenchError("--only, --skip and --senders leave no way to be timed")
    return names


def needs_ray(name: str) -> bool:
    """Whether the way needs a Ray."""
    return "ray" in name.split("-")


@dataclass(frozen=True, slots=True)
class Parts:
    """What is known of the last update, seconds each."""

    write: float | None = None  # until the bytes wait where the receiver finds them
    flip: float | None = None  # in which the receiver could not serve
    control: float | None = None  # the messages, without the work that they are about


@dataclass(frozen=True, slots=True)
class Control:
    """The bytes of one update's messages, both directions, that are not weights."""

    bodies: int | None = None
    wire: int | None = None  # with HTTP's headers, as they went through a TCP connection


class Way(Protocol):
    """One way to move the weights, between two processes that are up."""

    name: str

    def change(self) -> str:
        """Change the weights that this way sends, in place; their digest."""

    def prepare(self, counted: bool) -> None:
        """Get ready for `send`, untimed; `counted`: through a relay that counts the bytes, where there is one."""

    def send(self) -> None:
        """One whole update: on return the receiver's module has the weights."""

    def held(self) -> str:
        """The digest of what the receiver's module holds."""

    def parts(self) -> Parts: ...

    def plan(self) -> str:
        """How the receiver takes the bytes; "" if it does not say."""

    def control(self) -> Control:
        """Of the last update; on the wire only if it was counted."""


Connect = Callable[[], list[Way]]  # waits for the receiving process


@dataclass(frozen=True, slots=True)
class Unit:
    """Ways that share one receiving process, and the memory that both processes need, in bytes of the model."""

    names: list[str]
    holds: float  # while it is open
    peak: float  # more while it sends
    start: Callable[[], AbstractContextManager[Connect]]
