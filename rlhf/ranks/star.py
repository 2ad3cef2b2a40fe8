"""Connections between the first rank and each other one: one to talk, and one by whose end each notices the other's.

Authenticated by a key that the ranks have from whoever started them (HMAC, as `multiprocessing.connection` does it).
Messages are bytes; nothing that arrives is ever unpickled.
"""

from __future__ import annotations

import multiprocessing.connection as mp
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError

from rlhf.ranks.frames import packed, unpacked

KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds: a host that is gone says nothing
HANDSHAKE_S = 5.0  # for a connection to show the key
LOOK_S = 0.2
TALK, LIFE = "talk", "life"


@dataclass(frozen=True, slots=True)
class Invitation:
    """Where the first rank waits for the others, and the key that lets them in."""

    host: str
    port: int
    key: str


@dataclass(slots=True)
class Star:
    """A rank's connections: of the first rank to each other rank, of any other rank to the first; in ranks' order."""

    talk: list[mp.Connection]
    life: list[mp.Connection]

    def shut(self) -> None:
        """Let whoever waits on any of them fail, at both ends."""
        for each in (*self.talk, *self.life):
            with suppress(OSError), _socket_of(each) as connected:
                connected.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End all connections; who waits at the other end notices."""
        for each in (*self.talk, *self.life):
            with suppress(OSError):
                each.close()


class Meeting:
    """The first rank's end of an invitation: a listening socket until all have come."""

    def __init__(self, host: str, key: str) -> None:
        self._socket = socket.create_server((host, 0))
        self._key = key.encode()
        self.invitation = Invitation(host, self._socket.getsockname()[1], key)

    def close(self) -> None:
        """Let nobody in any more."""
        self._socket.close()

    def all(self, count: int, until: float, check: Callable[[], None]) -> Star:
        """The connections once `count` - 1 others have come; TimeoutError names who has not at `until`.

        Meanwhile `check` is called again and again; it raises if somebody will never come.
        """
        found: dict[tuple[str, int], mp.Connection] = {}
        wanted = {(kind, number) for kind in (TALK, LIFE) for number in range(1, count)}
        while missing := wanted - found.keys():
            self._socket.settimeout(LOOK_S)
            try:
                accepted, _ = self._socket.accept()
            except TimeoutError:
                check()
                if time.monotonic() < until:
                    continue
                ranks = ", ".join(str(number) for number in sorted({number for _, number in missing}))
                raise TimeoutError(f"of the trainer's {count} ranks these have not come: {ranks}") from None
            with suppress(OSError, EOFError, ValueError, AssertionError, AuthenticationError):  # a stranger
                connection = _connection(accepted, HANDSHAKE_S)
                mp.deliver_challenge(connection, self._key)
                mp.answer_challenge(connection, self._key)
                kind, number = unpacked(connection.recv_bytes(1000))
                if (kind, number) in missing:
                    _patient(connection)
                    found[kind, number] = connection
        return Star(*([found[kind, number] for number in range(1, count)] for kind in (TALK, LIFE)))


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


def _socket_of(connection: mp.Connection) -> socket.socket:
    """Another descriptor of its socket."""
    return socket.socket(fileno=os.dup(connection.fileno()))


def _timeval(seconds: float) -> bytes:
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
