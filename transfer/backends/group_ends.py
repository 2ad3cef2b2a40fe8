"""The ends of a process group of a trainer and workers (process_group.py), and how they meet.

    TrainerGroup   rank 0, with the store in which all meet; `where` is what the others must be told
    WorkerGroup    a worker's: the next rank behind the trainer's that the store gives it
    RankGroup      of another rank of a trainer of several, which sends, too: it has the same number there

Who cannot go on says so in the store: then all others end, also where the library does not notice.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from transfer.backends.process_group import LOOK_S, Group
from transfer.config import Library
from transfer.memory import regions

LINGER_S = 2.0  # for a worker that comes late to learn that the group was given up before it was formed
GO, GIVEN_UP = "go", "given up"  # keys of the store


class TrainerGroup(Group):
    """The trainer's end, with the store in which all meet."""

    def __init__(self, library: Library, device: torch.device, world: int, host: str) -> None:
        super().__init__(library, device, world)
        self._host = host
        self._nonce = secrets.token_hex(16)
        self._all_here = False
        with listener(host) as bound:
            port = bound.getsockname()[1]
            store = dist.TCPStore(
                host, port, None, True, wait_for_workers=False, master_listen_fd=os.dup(bound.fileno())
            )
        self._store = dist.PrefixStore(self._nonce, store)
        self.where = {"port": port, "nonce": self._nonce, "world": world}

    def _met(self) -> tuple[dist.Store, int, str]:
        store = self._store
        if store is None:  # closed before this thread came so far
            self._check()
        assert store is not None
        self._await(self._all_came, store)
        self._all_here = True
        if self._library is Library.nccl:
            devices = [regions.device_uuid(self._device)]
            devices += [store.get(f"device/{rank}").decode() for rank in range(1, self._world)]
            if len(set(devices)) < len(devices):
                raise ValueError(one_gpu(f"each has one of {', '.join(sorted(set(devices)))}"))
        store.set(GO, "")
        return store, 0, self._host

    def _all_came(self, store: dist.Store) -> bool:
        return store.add("rank", 0) >= self._world - 1

    def _leave_store(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            with suppress(RuntimeError):
                store.set(GIVEN_UP, "")
            if not self._all_here:
                threading.Thread(target=_linger, args=(store,), daemon=True).start()


class JoiningGroup(Group):
    """The end of whoever comes to a trainer's store."""

    def __init__(self, library: Library, device: torch.device, host: str, where: Mapping[str, Any]) -> None:
        super().__init__(library, device, where["world"])
        self._host, self._port, self._nonce = host, where["port"], where["nonce"]
        self.named = (self._port, self._nonce)

    def _met(self) -> tuple[dist.Store, int, str]:
        try:
            with socket.create_connection((self._host, self._port), self._left().total_seconds()) as probe:
                address = probe.getsockname()[0]  # of the interface towards the trainer
        except OSError as error:
            place = f"{self._host}:{self._port}"
            raise ConnectionError(f"the trainer cannot be reached at {place} (transfer.host): {error}") from error
        tcp = dist.TCPStore(self._host, self._port, None, False, timeout=self._left(), wait_for_workers=False)
        self._store = store = dist.PrefixStore(self._nonce, tcp)
        rank = self._number(store)
        if self._library is Library.nccl:
            store.set(f"device/{rank}", regions.device_uuid(self._device))
        store.add("rank", 1)
        self._await(store.check, [GO])  # no closure: the frame of one would hold the store as long as an error
        return store, rank, address

    @abstractmethod
    def _number(self, store: dist.Store) -> int:
        """Of this process in the group."""

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Learn meanwhile if somebody gives up, or the trainer is gone: the library itself may not notice."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(LOOK_S):
                try:
                    gone = (store := self._store) is not None and store.check([GIVEN_UP])
                except RuntimeError:
                    gone = True
                if gone:
                    self._given_up.set()
                    return

        threading.Thread(target=look, daemon=True).start()
        try:
            yield
        finally:
            over.set()


class WorkerGroup(JoiningGroup):
    """A worker's end; the trainer has so many `ranks`."""

    def __init__(
        self, library: Library, device: torch.device, host: str, where: Mapping[str, Any], ranks: int = 1
    ) -> None:
        super().__init__(library, device, host, where)
        self._ranks = ranks

    def _number(self, store: dist.Store) -> int:
        rank = self._ranks - 1 + int(store.add("claimed", 1))
        if rank >= self._world:
            raise ValueError(f"more workers came than the {self._world - self._ranks} that were told to")
        return rank


class RankGroup(JoiningGroup):
    """The end of rank `rank` of a trainer, 1 or higher."""

    def __init__(self, library: Library, device: torch.device, host: str, where: Mapping[str, Any], rank: int) -> None:
        super().__init__(library, device, host, where)
        self._rank = rank

    def _number(self, store: dist.Store) -> int:
        return self._rank


def one_gpu(detail: str) -> str:
    """Why NCCL cannot be used between processes on one GPU, and what to change."""
    return (
        f"transfer=nccl needs a GPU of its own for each rank of the trainer and each worker ({detail}): use "
        "transfer=ipc on one GPU, or transfer=gloo"
    )


def listener(host: str) -> socket.socket:
    """A listening socket on a free port of this address; ValueError if it is not one of this machine's."""
    try:
        return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"transfer.host must be an address of the trainer's machine (got {host!r}): {error}") from None


def _linger(store: dist.Store) -> None:
    """Keep a store open for a while: a worker that finds none tries until its deadline."""
    time.sleep(LINGER_S)
