"""How the ranks of a trainer meet: connections to the first, then the process group in which they add tensors up."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from rlhf.config import RunConfig
from rlhf.config.model import Device
from rlhf.ranks.place import Place
from rlhf.ranks.ranks import ALONE, Joined, Ranks
from rlhf.ranks.spec import spec_of
from rlhf.ranks.star import Meeting, Star, join
from rlhf.ranks.starting import Processes, Starter, Torchrun
from rlhf.shell.ending import RunError
from transfer.backends.environment import environment

START_S = 180.0  # until all ranks have come: each imports torch, on a machine that may be busy
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


@contextmanager
def met(
    config: RunConfig, folder: Path, place: Place, resume: bool = False, starter: Starter | None = None
) -> Iterator[Ranks]:
    """All ranks of the trainer, met; the first lets `starter` start the others, by default torchrun or itself.

    Their logs go to `folder`. They part together; where one of them fails, all end.
    """
    device = _device(config, place)
    if place.count == 1:
        yield ALONE
        return
    with ExitStack() as stack:
        if place.invitation is None:
            starter = starter or (Torchrun() if place.torchrun else Processes(folder, stack))
            star, address = _all_come(config, folder, place, resume, starter), starter.address
        else:
            star, address = join(place.invitation, place.number), place.invitation.host
        ranks = Joined(place, star, address, config.trainer.timeout_s)
        try:
            with _process_group(ranks, device), _told_at_once(ranks), ranks.interrupted():
                yield ranks
        except BaseException as error:
            ranks.close(error)
            raise
        ranks.close()


@contextmanager
def _told_at_once(ranks: Joined) -> Iterator[None]:
    """What ends this rank ends the others before the process group is taken down, which may take long."""
    try:
        yield
    except BaseException as error:
        ranks.close(error)
        raise


def _all_come(config: RunConfig, folder: Path, place: Place, resume: bool, starter: Starter) -> Star:
    """The first rank's connections, once all others are there."""
    with closing(Meeting(starter.address, secrets.token_hex(16))) as meeting:
        others = [
            replace(place, number=number, local=number % place.holders, invitation=meeting.invitation)
            for number in range(1, place.count)
        ]
        starter.start([spec_of(config, folder, other, resume) for other in others])
        try:
            return meeting.all(place.count, time.monotonic() + START_S, starter.check)
        except TimeoutError as error:
            raise RunError(f"{error}; their logs are {folder}/rank-*.log") from None


def _device(config: RunConfig, place: Place) -> torch.device:
    """This rank's device; torch's current one from now on, where there are several."""
    gpus = config.trainer.gpus
    if gpus is not None and not torch.cuda.is_available():
        raise ValueError(f"trainer.gpus names GPUs, and torch sees none here: leave it out (got {gpus})")
    if config.model.device is Device.cpu or not torch.cuda.is_available() or (place.count == 1 and gpus is None):
        return torch.device("cpu")
    number, there = gpus[place.local] if gpus is not None else place.local, torch.cuda.device_count()
    if number >= there:
        raise ValueError(
            f"each rank of the trainer needs a GPU, rank {place.number} the one of number {number}, and {there} are "
            "visible here, from 0: lower trainer.ranks, change trainer.gpus, or set model.device=cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


@contextmanager
def _process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """torch's default process group: gloo, and NCCL for GPUs; its collectives end by `trainer.timeout_s`."""
    assert isinstance(ranks, Joined)
    store: dist.TCPStore | None = None
    if ranks.first:
        store = _store(ranks.address)
    port = ranks.told(store.port if store is not None else None)
    if store is None:
        store = dist.TCPStore(ranks.address, port, None, False, wait_for_workers=False)
    with _interface(ranks.address):
        on_gpu = device.type == "cuda"
        with ranks.explained():
            form = partial(
                dist.init_process_group,
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=store,
                rank=ranks.number,
                world_size=ranks.count,
                timeout=timedelta(seconds=ranks.timeout_s),
                device_id=device if on_gpu else None,
            )
            if on_gpu:  # whose current device is this thread's alone
                form()
            else:
                _interruptible(form)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _interruptible(work: Callable[[], None]) -> None:
    """Do it in a thread of its own: a rank that waits in it for one that is gone would hear of that by no signal."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="process group", daemon=True).start()
    done.result()


def _store(host: str) -> dist.TCPStore:
    """One that listens at this address alone: it knows nobody."""
    with socket.create_server((host, 0)) as bound:
        port = bound.getsockname()[1]
        return dist.TCPStore(host, port, None, True, wait_for_workers=False, master_listen_fd=os.dup(bound.fileno()))


@contextmanager
def _interface(host: str) -> Iterator[None]:
    """Where all ranks are on this machine, gloo listens on its loopback interface alone, if nobody chose another."""
    there = socket.gethostbyname(host).startswith("127.") and "lo" in (name for _, name in socket.if_nameindex())
    chosen = {GLOO_INTERFACE: "lo"} if there and GLOO_INTERFACE not in os.environ else {}
    with environment(chosen):
        yield
