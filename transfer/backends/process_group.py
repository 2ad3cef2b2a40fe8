"""A torch.distributed process group of a trainer and workers: apart from torch's default one, ended by any error.

How its ends meet is in group_ends.py. What is authenticated: the control plane alone, which tells workers the store's
port and a random nonce under which its keys lie. The store and the library's own connections have no encryption and
know nobody: whoever can connect to them can read the weights or disturb an update, and a digest is no protection
against a forger. So the store, and gloo, are bound to `transfer.host` only, loopback by default; give another address
in a network that you trust. NCCL binds to the interfaces that it chooses (NCCL_SOCKET_IFNAME).
"""

from __future__ import annotations

import re
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from transfer.backends.environment import environment
from transfer.config import Library

LOOK_S = 0.05  # between two looks whether the deadline has passed, or the others have given up
POLL_S = 0.0002  # between two looks whether a GPU is done
BURY_S = 2.0  # to wait until a group is gone
SHARE = 0.8  # of a message's deadline, for the whole broadcast: its answer needs time, too
DEPTH = 2  # tensors under way, or being made
NCCL_ENVIRONMENT = {  # else a peer that is late or gone ends the whole process
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


class Group(ABC):
    """A process group of one trainer and its workers; every wait ends by `until`, or when the trainer gives up."""

    def __init__(self, library: Library, device: torch.device, world: int) -> None:
        self._library = library
        self._device = device  # that the library moves bytes between
        self._world = world
        self._store: dist.Store | None = None
        self._group: Any = None
        self._under_way: deque[tuple[int, torch.Tensor, Any]] = deque()
        self._given_up = threading.Event()
        self._until = 0.0

    @property
    def usable(self) -> bool:
        """Whether nobody has given it up."""
        return not self._given_up.is_set()

    def broadcast(
        self,
        timeout_s: float,
        count: int,
        tensor: Callable[[int], torch.Tensor],
        done: Callable[[int, torch.Tensor], None] = lambda index, given: None,
        root: Callable[[int], int] = lambda index: 0,
    ) -> None:
        """Form the group, unless it is, and broadcast `count` tensors, each from its `root`; `done` is told in order.

        Any error, a TimeoutError at the deadline say, ends the group.
        """
        self._until = time.monotonic() + timeout_s
        try:
            with self._watched():
                if self._group is None:
                    self._form()
                for index in range(count):
                    if len(self._under_way) == DEPTH:
                        self._complete(done)
                    self._under_way.append((index, given := tensor(index), self._start(given, root(index))))
                while self._under_way:
                    self._complete(done)
        except BaseException as error:
            self.close()
            traceback.clear_frames(error.__traceback__)  # whoever keeps the error keeps no connection alive
            if isinstance(error, RuntimeError) and not isinstance(error, torch.cuda.OutOfMemoryError):
                raise ConnectionError(f"the broadcast broke off: {_readable(error)}") from error
            raise

    def give_up(self) -> None:
        """Let whoever waits in it fail at once, on both sides."""
        self._given_up.set()

    def close(self) -> None:
        """Leave the group, and tell whoever is still in it."""
        self._given_up.set()
        group, self._group = self._group, None
        works = [work for _, _, work in self._under_way]
        self._under_way.clear()
        self._leave_store()
        if group is None:
            return
        busy, busy_on_gpu = bool(works), self._library is Library.nccl
        burial = threading.Thread(target=_bury, args=(self._library, group, works), daemon=True)
        del group, works
        burial.start()
        if busy_on_gpu or not busy:
            burial.join(BURY_S)

    # --- forming ------------------------------------------------------------------------------------------------------

    def _form(self) -> None:
        """Meet the others and connect, in a thread that can be left alone: what it calls may wait for ever."""
        outcome: list[Any] = []
        thread = threading.Thread(target=self._meet, args=(outcome,), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_S)
            if thread.is_alive():
                self._check()
        if isinstance(outcome[0], BaseException):
            raise outcome.pop()
        self._group = outcome.pop()
        self._check()

    def _meet(self, outcome: list[Any]) -> None:
        """Put the group, or why there is none, in `outcome`; nothing keeps a connection when nobody waits any more."""
        try:
            outcome.append(self._connected())
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            outcome.append(error)
            del outcome  # which holds the error, which holds this frame: only the garbage collector would end that
        if self._given_up.is_set():
            self._leave_store()

    def _connected(self) -> Any:
        store, rank, address = self._met()
        options: Any
        if self._library is Library.gloo:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address, lazy_init=False)]
            options._threads = DEPTH
            options._timeout = self._left()
            return dist.ProcessGroupGloo(store, rank, self._world, options)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._left()
        with torch.cuda.device(self._device), environment(NCCL_ENVIRONMENT):
            group = dist.ProcessGroupNCCL(store, rank, self._world, options)
            group.eager_connect_single_device(self._device)
        return group

    @abstractmethod
    def _met(self) -> tuple[dist.Store, int, str]:
        """The store, this process's rank, and the address at which the others reach it, once all have come."""

    def _leave_store(self) -> None:
        self._store = None

    def _await(self, come: Callable[..., bool], *given: Any) -> None:
        pause = POLL_S
        while not come(*given):
            self._check()
            time.sleep(pause)
            pause = min(2 * pause, LOOK_S)

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _left(self) -> timedelta:
        return timedelta(seconds=max(0.001, self._until - time.monotonic()))

    def _check(self) -> None:
        if self._given_up.is_set():
            raise ConnectionAbortedError("the trainer gave the broadcast up, or is gone")
        if time.monotonic() > self._until:
            raise TimeoutError("the broadcast did not end before its deadline: a peer is late or gone")

    def _start(self, tensor: torch.Tensor, root: int) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = root, 0, True
        options.timeout = self._left()
        return self._group.broadcast([tensor], options)

    def _complete(self, done: Callable[[int, torch.Tensor], None]) -> None:
        """Wait for the oldest tensor under way."""
        index, tensor, work = self._under_way[0]
        while not self._is_done(work):
            self._check()
        self._under_way.popleft()
        done(index, tensor)

    def _is_done(self, work: Any) -> bool:
        """Whether it is, after a moment; its error, if it has failed."""
        if self._library is Library.nccl:
            if not work.is_completed():
                time.sleep(POLL_S)
                return False
        else:
            with suppress(RuntimeError):  # the moment is over, or the work has failed
                work.wait(timedelta(seconds=LOOK_S))
                return True
            if not work.is_completed():
                return False
        work.wait()
        return True

    @contextmanager
    def _watched(self) -> Iterator[None]:
        yield


def _bury(library: Library, group: Any, works: list[Any]) -> None:
    """Let a group go once nothing in it is under way any more."""
    if library is Library.nccl and group is not None:
        with suppress(RuntimeError):
            group.abort()
    for work in works:
        with suppress(RuntimeError):
            work.wait()  # at most until its own deadline
    works.clear()


def _readable(error: RuntimeError) -> str:
    """The library's words without its source lines and its advice."""
    text = re.sub(r"\[/[^\]]*\]\s*", "", str(error)).partition(". This is")[0]
    return text.strip().splitlines()[0][:500] if text.strip() else type(error).__name__
