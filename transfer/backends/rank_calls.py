"""What the first rank of a trainer asks the others for at any time, whatever their main threads do: rows of weights.

    Calls       the first rank's end: one call at a time, to all others at once
    Answering   another rank's: a thread that answers until either end is closed

A connection to each other rank, opened with a key that the ranks' own way of talking has told; what is said is JSON,
sometimes with bytes behind it. It ends with the process, so that either side notices at once when the other is gone.
A call has a number: what is still on its way of an earlier one, which has broken off, is passed over.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from typing import Any

import torch

from transfer.backends.group_ends import listener
from transfer.backends.process_group import LOOK_S

COME_S = 10.0  # for a rank's connection, which is there already
HEAR_S = 2.0  # for the others to say how a broadcast has ended once it has failed here, or must have ended there
MAX_WORDS = 2**20  # bytes of one message, without those behind it
LENGTH = struct.Struct(">I")
KINDS = {"aborted": ConnectionAbortedError, "broken": ConnectionError}  # of errors that follow from another one's
Say = Callable[[Mapping[str, Any], torch.Tensor], None]
Act = Callable[[Mapping[str, Any], Say], Mapping[str, Any]]


class Wire:
    """JSON objects over a connection, and bytes that one of them announces; OSError or ValueError: it is of no use."""

    def __init__(self, connected: socket.socket, patience_s: float | None) -> None:
        connected.settimeout(patience_s)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = connected

    def fileno(self) -> int:
        """To wait for several."""
        return self._socket.fileno()

    def say(self, value: Mapping[str, Any], data: torch.Tensor | None = None) -> None:
        """An object, and the bytes of a tensor [n] of uint8 on the host."""
        words = json.dumps({**value, "bytes": 0 if data is None else len(data)}).encode()
        self._socket.sendall(LENGTH.pack(len(words)) + words)
        if data is not None:
            self._socket.sendall(data.numpy().data)

    def hear(self) -> dict[str, Any]:
        """The next object; as many bytes come behind it as its `bytes` says."""
        (length,) = LENGTH.unpack(self._read(bytearray(LENGTH.size)))
        if length > MAX_WORDS:
            raise ValueError(f"a message of {length} bytes")
        value = json.loads(self._read(bytearray(length)))
        if not isinstance(value, dict) or not isinstance(value.get("bytes"), int):
            raise ValueError("a message that is no call's")
        return value

    def take(self, into: torch.Tensor) -> None:
        """The bytes behind the last object."""
        self._read(into.numpy().data)

    def close(self) -> None:
        """Whoever reads at either end notices."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, into: Any) -> Any:
        left = memoryview(into)
        while left:
            if not (count := self._socket.recv_into(left)):
                raise ConnectionError("the connection has ended")
            left = left[count:]
        return into


class Calls:
    """The first rank's end. `lost` says, once a rank is gone, which: then no call can be made any more."""

    def __init__(self, host: str, patience_s: float) -> None:
        self.lost: str | None = None
        self._patience_s = patience_s  # without a byte of one that should come
        self._listener = listener(host)
        self._key = secrets.token_hex(16)
        self._wires: dict[int, Wire] = {}
        self._number = 0
        self._alone = threading.Lock()
        self.where = {"host": host, "port": self._listener.getsockname()[1], "key": self._key}

    def meet(self, count: int) -> None:
        """Let those in that have come, all `count` - 1 others of the trainer; then nobody any more."""
        until = time.monotonic() + COME_S
        with self._listener as door:
            while len(self._wires) < count - 1:
                door.settimeout(max(0.001, until - time.monotonic()))
                connected, _ = door.accept()
                wire = Wire(connected, max(0.001, until - time.monotonic()))
                rank = self._shown(wire, count)
                if rank is None:
                    wire.close()
                else:
                    self._wires[rank] = Wire(connected, self._patience_s)

    def close(self) -> None:
        """The others' threads end."""
        self._listener.close()
        for wire in self._wires.values():
            wire.close()
        self.lost = self.lost or "the transfer was closed"

    @contextmanager
    def call(self, request: Mapping[str, Any]) -> Iterator[Call]:
        """Ask all others for something; ConnectionError if one is gone, TimeoutError if another call does not end."""
        if not self._alone.acquire(timeout=self._patience_s):
            raise TimeoutError("an earlier call of the other ranks does not end")
        try:
            if self.lost is not None:
                raise ConnectionError(self.lost)
            self._number += 1
            for rank in self._wires:
                with self._kept(rank):
                    self._wires[rank].say({**request, "call": self._number})
            yield Call(self, self._number)
        finally:
            self._alone.release()

    def next(self, rank: int, number: int) -> dict[str, Any]:
        """What a rank says next about a call; OSError, also for what it could not do."""
        with self._kept(rank):
            while (said := self._wires[rank].hear()).get("call") != number:
                if said["bytes"]:
                    self._wires[rank].take(torch.empty(said["bytes"], dtype=torch.uint8))
        if "error" in said:
            raise KINDS.get(str(said.get("kind")), OSError)(f"rank {rank}: {said['error']}")
        return said

    def take(self, rank: int, into: torch.Tensor) -> None:
        """The bytes behind what it has said."""
        with self._kept(rank):
            self._wires[rank].take(into)

    def speaking(self, ranks: Sequence[int]) -> list[int]:
        """Of these ranks those that have said something, or are gone; after a moment."""
        ready = wait([self._wires[rank].fileno() for rank in ranks], LOOK_S)
        return [rank for rank in ranks if self._wires[rank].fileno() in ready]

    @property
    def ranks(self) -> list[int]:
        """All others."""
        return sorted(self._wires)

    def _shown(self, wire: Wire, count: int) -> int | None:
        """Whose connection this is; None for a stranger's."""
        with suppress(OSError, ValueError):
            said = wire.hear()
            rank = said.get("rank")
            known = hmac.compare_digest(str(said.get("key")).encode(), self._key.encode())
            if known and isinstance(rank, int) and 0 < rank < count and rank not in self._wires:
                return rank
        return None

    @contextmanager
    def _kept(self, rank: int) -> Iterator[None]:
        """Whatever breaks off in the middle of a message, nobody understands what comes after it."""
        try:
            yield
        except BaseException as error:
            self.lost = f"rank {rank} is gone"
            if isinstance(error, TimeoutError):
                self.lost = f"rank {rank} has said nothing for {self._patience_s:g} s"
            if isinstance(error, OSError | ValueError):
                raise ConnectionError(self.lost) from error
            raise


class Call:
    """One call, under way."""

    def __init__(self, calls: Calls, number: int) -> None:
        self._calls, self._number = calls, number

    def answers(self) -> list[dict[str, Any]]:
        """What each other rank says last; OSError."""
        return [self._calls.next(rank, self._number) for rank in self._calls.ranks]

    def take(self, rank: int, into: torch.Tensor) -> None:
        """The next bytes that a rank sends, as many as there is room for; OSError."""
        if self._calls.next(rank, self._number)["bytes"] != len(into):
            raise ConnectionError(f"rank {rank} has sent other rows than were asked for")
        self._calls.take(rank, into)

    def beside(self, work: Callable[[], None], trouble: Callable[[], None], limit_s: float) -> None:
        """Do this rank's part of what was asked for; `trouble` is called as soon as another fails in its own.

        Each has `limit_s` seconds for it: one that passes on what this one had of it at once may need longer.
        What is raised is the first error that does not merely say that somebody else has ended a connection.
        """
        found: list[Exception] = []
        over, until = threading.Event(), time.monotonic()
        thread = threading.Thread(target=self._collect, args=(found, over, trouble), daemon=True)
        thread.start()
        own: list[Exception] = []
        try:
            work()
            until += limit_s
        except Exception as error:
            own = [error]
        finally:
            thread.join(HEAR_S + max(0.0, until - time.monotonic()))
            over.set()
            thread.join()
        kinds = tuple(KINDS.values())
        errors = sorted([*found, *own], key=lambda error: sum(isinstance(error, kind) for kind in kinds))
        found.clear()
        own.clear()
        if errors:
            raise errors.pop(0)

    def _collect(self, found: list[Exception], over: threading.Event, trouble: Callable[[], None]) -> None:
        waiting = self._calls.ranks
        while waiting and not over.is_set():
            try:
                for rank in self._calls.speaking(waiting):
                    waiting.remove(rank)
                    self._calls.next(rank, self._number)
            except Exception as error:
                found.append(error)
                trouble()
                if not isinstance(error, OSError):  # the connections were closed
                    return
        if waiting:
            found.append(TimeoutError(f"rank {waiting[0]} does not come back"))


class Answering:
    """Another rank's end: `act` makes of a request what is answered; what it says before, it says by `Say`."""

    def __init__(self, where: Mapping[str, Any], rank: int, act: Act) -> None:
        self._act = act
        place = where["host"], where["port"]
        try:
            self._wire = Wire(socket.create_connection(place, COME_S), None)
        except OSError as error:
            at = f"{place[0]}:{place[1]}"
            raise ConnectionError(f"the first rank cannot be reached at {at} (transfer.host): {error}") from error
        self._wire.say({"key": where["key"], "rank": rank})
        threading.Thread(target=self._answer, name="rank calls", daemon=True).start()

    def close(self) -> None:
        """No call is answered any more."""
        self._wire.close()

    def _answer(self) -> None:
        with suppress(OSError, ValueError):
            while True:
                request = self._wire.hear()
                number = request["call"]
                self._wire.say({**self._answered(request, number), "call": number})

    def _answered(self, request: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        try:
            return self._act(request, lambda value, data: self._wire.say({**value, "call": number}, data))
        except Exception as error:
            kind = next((name for name, kind in KINDS.items() if isinstance(error, kind)), None)
            return {"error": str(error) or type(error).__name__, "kind": kind}
