"""The peers' ways between GPUs, each with a receiving process of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from transfer.bench import peers
from transfer.bench.lab import START_S, TIMEOUT_S, Lab, Unavailable
from transfer.bench.packing import buckets, packed
from transfer.bench.peer_worker import broadcast, join, send_packed
from transfer.bench.peers import Peer, PeerWay
from transfer.bench.ways import NCCL, Connect, Unit, Way
from transfer.memory.sums import as_bytes

LEAVE_S = 20.0  # deadline of leaving a process group
HANDLES = ("handle-by-tensor", "handle-packed")


def units(lab: Lab, names: Collection[str]) -> list[Unit]:
    """What must be started for these ways."""
    made = [Unit([name], 1.0, 0.0, partial(_by_handle, lab, name)) for name in names if name in HANDLES]
    made += peers.units(lab, [name for name in names if name not in HANDLES and name not in NCCL])
    broadcasts = [name for name in names if name in NCCL]
    return made + ([Unit(broadcasts, 1.0, 0.0, partial(_by_nccl, lab, broadcasts))] if broadcasts else [])


# --- CUDA IPC handles -------------------------------------------------------------------------------------------------


class TensorHandles(PeerWay):
    """All tensors in one message, each as the handle that torch.multiprocessing makes of it."""

    def __init__(self, name: str, lab: Lab, peer: Peer) -> None:
        super().__init__(name, lab.source, self._send, partial(peer.ask, "digest"))
        self._peer = peer
        self._exported: dict[str, torch.Tensor] = {}

    def prepare(self, counted: bool) -> None:
        """Make tensors of the same memory whose storages were never exported: each export would wrap them once more."""
        self._exported = {
            name: torch.from_dlpack(as_bytes(tensor)).view(tensor.dtype).view(tensor.shape)
            if tensor.numel()
            else tensor
            for name, tensor in self._source.weights.items()
        }

    def _send(self) -> None:
        self._peer.ask("tensors", self._exported)


class PackedHandles(PeerWay):
    """A buffer of many tensors in one message, acknowledged before the next."""

    def __init__(self, name: str, lab: Lab, peer: Peer) -> None:
        super().__init__(name, lab.source, self._send, partial(peer.ask, "digest"))
        self._peer = peer
        self._buckets = buckets(lab.source.manifest.entries)

    def _send(self) -> None:
        for index, bucket in enumerate(self._buckets):
            self._peer.ask("packed", (index, packed(self._source.weights, bucket)))


@contextmanager
def _by_handle(lab: Lab, name: str) -> Iterator[Connect]:
    with Peer(lab) as peer:

        def connect() -> list[Way]:
            _await(lab, peer)
            kind = {"handle-by-tensor": TensorHandles, "handle-packed": PackedHandles}[name]
            return [kind(name, lab, peer)]

        yield connect


def _await(lab: Lab, peer: Peer) -> None:
    peer.tell("port")
    peer.hear(START_S)
    lab.ready()


# --- broadcast --------------------------------------------------------------------------------------------------------


@contextmanager
def _by_nccl(lab: Lab, names: list[str]) -> Iterator[Connect]:
    with ExitStack() as stack:
        peer = stack.enter_context(Peer(lab))
        weights = {entry.name: lab.source.weights[entry.name] for entry in lab.source.manifest.entries}
        groups = buckets(lab.source.manifest.entries)
        device = next(tensor.device for tensor in weights.values())

        def both(verb: str, ours: Callable[[], None]) -> None:
            peer.tell(verb)
            try:
                ours()
                _await_device(device)
            except BaseException:
                _left(device)  # else whatever this process queues next would wait for the broadcast
                raise
            peer.hear()

        sends = {
            "nccl-by-tensor": partial(both, "broadcast", partial(broadcast, weights)),
            "nccl-packed": partial(both, "broadcast-packed", partial(send_packed, weights, groups)),
        }

        def connect() -> list[Way]:
            _await(lab, peer)
            stack.callback(_left, device)
            backend = "nccl" if device.type == "cuda" else "gloo"
            file = str(lab.folder / "group")
            peer.tell("join", (backend, file))
            _within(START_S, "joining the group", partial(join, backend, file, rank=0))
            peer.hear(START_S)
            _within(TIMEOUT_S, "the first broadcast", sends[names[0]])  # which also connects the two
            return [PeerWay(name, lab.source, sends[name], partial(peer.ask, "digest")) for name in names]

        yield connect


def _await_device(device: torch.device) -> None:
    """Wait for the current stream with a deadline: a broadcast whose peer is gone never ends."""
    if device.type != "cuda":
        return
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    deadline = time.monotonic() + TIMEOUT_S
    while not event.query():
        if time.monotonic() > deadline:
            raise Unavailable(f"the broadcast did not end within {TIMEOUT_S:g} s")


def _left(device: torch.device) -> None:
    """Leave the group, also where its last broadcast did not end."""
    if not torch.distributed.is_initialized():
        return
    leave = torch.distributed.destroy_process_group
    if device.type == "cuda":  # which need not wait for the peer
        leave = torch.distributed.distributed_c10d._abort_process_group
    _within(LEAVE_S, "leaving the group", leave)


def _within(seconds: float, what: str, action: Callable[[], None]) -> None:
    """Run what has no deadline of its own; Unavailable if it takes longer, while a daemon thread waits on."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Unavailable(f"{what} did not end within {seconds:g} s")
    if errors:
        raise errors[0]
