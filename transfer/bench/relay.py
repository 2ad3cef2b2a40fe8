"""A TCP relay on loopback that counts what goes through it: the bytes of a connection as they are on the wire."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit

CONNECT_S = 10.0  # deadline of the connection to the server behind


class Relay:
    """Listens on a free port and passes every connection on to the server of `url`; `bytes` counts both directions."""

    def __init__(self, url: str) -> None:
        server = urlsplit(url)
        assert server.hostname is not None and server.port is not None
        self._server = (server.hostname, server.port)
        self._lock = threading.Lock()  # of the counter
        self._sockets: list[socket.socket] = []
        self.bytes = 0  # of TCP's payload: HTTP's headers and bodies
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._accepting.join(CONNECT_S)
        self._listener.close()
        for side in self._sockets:
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return  # closed
            try:
                server = socket.create_connection(self._server, CONNECT_S)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            self._sockets += [client, server]
            for source, target in ((client, server), (server, client)):
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):  # one of the two is gone
            while data := source.recv(2**16):
                with self._lock:
                    self.bytes += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
