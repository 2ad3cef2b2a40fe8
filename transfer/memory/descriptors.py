"""How a worker gets the trainer's host memory: its descriptor, over an abstract Unix socket, to the same user alone.

Whoever shares the network namespace may connect to such a socket, and fill its queue. So the trainer looks at who is
there (SO_PEERCRED) before anything else, waits for nobody, and lives on when descriptors run out; a worker waits its
turn until a deadline.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import struct
import threading
import time
from contextlib import suppress

from transfer.memory.regions import HostRegion, PeerHostRegion

QUEUE = 64  # connections that wait to be accepted; further ones wait in connect
HANDSHAKE_S = 10.0  # deadline of getting a descriptor, however many others want one
AGAIN_S = 0.05  # until the next try, where no descriptor was free
SOCKET = re.compile(r"\0transfer-[0-9a-f]{32}")  # the name of a DescriptorServer's
HERE, AGAIN = b"\0", b"\1"  # what comes with the descriptor, and what comes where there was none to be had


class DescriptorServer:
    """Hands a host region's read-only descriptor to whoever of the same user connects.

    The socket's name is in no folder, so that nothing is left however this process ends; both sides check the other's
    user. It exists from the start, so that workers can be told its name before there is any memory to share.
    """

    def __init__(self) -> None:
        self.path = f"\0transfer-{secrets.token_hex(16)}"
        self._region: HostRegion | None = None
        self._closed = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(self.path)
            self._socket.listen(QUEUE)
        except BaseException:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="transfer-descriptors", daemon=True)
        self._thread.start()

    def offer(self, region: HostRegion) -> None:
        """From now on hand out this region."""
        self._region = region

    def close(self) -> None:
        """End the thread and the socket."""
        self._closed.set()
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(HANDSHAKE_S)
        self._socket.close()

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                peer, _ = self._socket.accept()
            except OSError:  # no descriptor is free: whoever has connected waits; or this is the end
                self._closed.wait(AGAIN_S)
                continue
            with peer, suppress(OSError):  # that peer is gone, and sees why on its side
                self._hand_over(peer)

    def _hand_over(self, peer: socket.socket) -> None:
        region = self._region
        if _peer_uid(peer) != os.geteuid() or region is None:
            return
        peer.setblocking(False)  # one byte has room in a new connection
        try:
            fd = region.read_only_fd()
        except OSError:
            peer.send(AGAIN)
            return
        try:
            socket.send_fds(peer, [HERE], [fd])
        finally:
            os.close(fd)


def receive_region(path: str, nbytes: int) -> PeerHostRegion:
    """Fetch and map what the DescriptorServer at `path` offers; OSError or ValueError if it is not ours.

    TimeoutError if others have kept it busy for HANDSHAKE_S.
    """
    deadline = time.monotonic() + HANDSHAKE_S
    while (fd := _fetched(path, deadline - time.monotonic())) is None:
        if time.monotonic() + AGAIN_S > deadline:
            raise TimeoutError(f"the socket {path!r} handed over no memory within {HANDSHAKE_S:g} s: it is kept busy")
        time.sleep(AGAIN_S)
    try:
        return PeerHostRegion(fd, nbytes)
    finally:
        os.close(fd)  # the mapping stays


def _fetched(path: str, timeout_s: float) -> int | None:
    """The descriptor; None if it was not this process's turn within about `timeout_s`, or none was free on one side.

    The kernel does the waiting, because only who waits in connect is let in as soon as the queue has room.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, _timeval(max(timeout_s, AGAIN_S)))
        try:
            connection.connect(path)
            if _peer_uid(connection) != os.geteuid():
                raise ConnectionError(f"the socket {path!r} belongs to another user")
            said, fds, flags, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
    if fds:
        return fds[0]
    if said == AGAIN or flags & socket.MSG_CTRUNC:
        return None
    raise ConnectionError(f"the socket {path!r} handed over no memory")


def _timeval(seconds: float) -> bytes:
    """A C timeval."""
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _peer_uid(connection: socket.socket) -> int:
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid
