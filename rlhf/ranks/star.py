"""Connections between the first rank and each other one: one to talk, and one by whose end each notices the other's.

Authenticated by a key that the ranks have from whoever started them (HMAC, as `multiprocessing.connection` does it).
Messages are bytes; nothing that arrives is ever unpickled.
"""

from __future__ import annotations

import multiprocessing.connection as mp
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from queue import SimpleQueue

from rlhf.ranks.frames import packed, unpacked
from rlhf.ranks.place import Invitation

KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds: a host that is gone says nothing
HANDSHAKE_S = 20.0  # for a connection to show the key
LOOK_S = 0.05
TALK, LIFE = "talk", "life"
Name = tuple[str, int]  # of a connection: its kind, and the rank at its other end


@dataclass(slots=True)
class Star:
    """A rank's connections: of the first rank to each other rank, of any other rank to the first; in ranks' order."""

    talk: list[mp.Connection]
    life: list[mp.Connection]

    def shut(self) -> None:
        """Let whoever waits on any of them fail, at both ends."""
        for each in (*self.talk, *self.life):
            _shut(each)

    def close(self) -> None:
        """End all connections; who waits at the other end notices."""
        for each in (*self.talk, *self.life):
            with suppress(OSError):
                each.close()


class Meeting:
    """The first rank's end of an invitation: a listening socket until all have come."""

    def __init__(self, host: str, key: str) -> None:
        self._socket = socket.create_server((host, 0))
        self._socket.settimeout(LOOK_S)
        self._key = key.encode()
        self._callers: list[tuple[float, mp.Connection]] = []  # who must have shown the key, and until when
        self._shown: SimpleQueue[tuple[mp.Connection, Name | None]] = SimpleQueue()  # None: a stranger
        self.invitation = Invitation(host, self._socket.getsockname()[1], key)

    def close(self) -> None:
        """Let nobody in any more."""
        self._socket.close()
        for _, connection in self._callers:
            _shut(connection)

    def all(self, count: int, until: float, check: Callable[[], None]) -> Star:
        """The connections once `count` - 1 others have come; TimeoutError names who has not at `until`.

        Meanwhile `check` is called again and again; it raises if somebody will never come. Whoever calls has a thread
        of their own to show the key in, so that nobody keeps others waiting.
        """
        found: dict[Name, mp.Connection] = {}
        names = [(kind, number) for kind in (TALK, LIFE) for number in range(1, count)]
        try:
            while missing := set(names) - found.keys():
                check()
                if time.monotonic() > until:
                    ranks = ", ".join(str(number) for number in sorted({number for _, number in missing}))
                    raise TimeoutError(f"of the trainer's {count} ranks these have not come: {ranks}")
                self._accept()
                while not self._shown.empty():
                    connection, name = self._shown.get()
                    self._callers = [each for each in self._callers if each[1] is not connection]
                    if name in missing and name not in found:
                        found[name] = connection
                    else:
                        connection.close()
        except BaseException:
            for each in found.values():
                each.close()
            raise
        ends = [found[name] for name in names]
        return Star(ends[: count - 1], ends[count - 1 :])

    def _accept(self) -> None:
        """Wait a moment for somebody to call; end the calls of those who are late."""
        with suppress(TimeoutError, ConnectionError):
            accepted, _ = self._socket.accept()
            connection = _connection(accepted, HANDSHAKE_S)
            self._callers.append((time.monotonic() + HANDSHAKE_S, connection))
            threading.Thread(target=self._let_in, args=(connection,), daemon=True).start()
        for until, connection in self._callers:
            if time.monotonic() > until:
                _shut(connection)

    def _let_in(self, connection: mp.Connection) -> None:
        name: Name | None = None
        with suppress(OSError, EOFError, ValueError, TypeError, struct.error, AssertionError, AuthenticationError):
            mp.deliver_challenge(connection, self._key)
            mp.answer_challenge(connection, self._key)
            kind, number = unpacked(connection.recv_bytes(1000))
            _patient(connection)
            name = str(kind), int(number)
        self._shown.put((connection, name))


def join(invitation: Invitation, number: int) -> Star:
    """Another rank's connections to the first; OSError if there is nobody, AuthenticationError if the key is wrong."""
    ends: dict[str, list[mp.Connection]] = {}
    for kind in (TALK, LIFE):
        connected = socket.create_connection((invitation.host, invitation.port), HANDSHAKE_S)
        connection = _connection(connected, HANDSHAKE_S)
        mp.answer_challenge(connection, invitation.key.encode())
        mp.deliver_challenge(connection, invitation.key.encode())
        connection.send_bytes(packed([kind, number]))
        _patient(connection)
        ends[kind] = [connection]
    return Star(ends[TALK], ends[LIFE])


def ended(connections: Sequence[mp.Connection], wait_s: float) -> list[mp.Connection]:
    """Those of the connections on which something has come, or that have ended, within `wait_s` seconds."""
    return [each for each in mp.wait(connections, wait_s) if isinstance(each, mp.Connection)]


def _connection(connected: socket.socket, wait_s: float) -> mp.Connection:
    """Reading from it fails after `wait_s` seconds without a byte."""
    connected.settimeout(None)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(wait_s))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return mp.Connection(connected.detach())


def _patient(connection: mp.Connection) -> None:
    """From now on reading waits for as long as the other end is there."""
    with _socket_of(connection) as connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(0))


def _shut(connection: mp.Connection) -> None:
    """Let whoever reads from it, at either end, fail."""
    with suppress(OSError), _socket_of(connection) as connected:
        connected.shutdown(socket.SHUT_RDWR)


def _socket_of(connection: mp.Connection) -> socket.socket:
    """Another descriptor of its socket."""
    return socket.socket(fileno=os.dup(connection.fileno()))


def _timeval(seconds: float) -> bytes:
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
