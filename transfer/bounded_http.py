"""uvicorn's HTTP/1.1 with bounds on what a client may send before anybody has looked at its token.

By itself uvicorn keeps request headers of any size, and goes on reading and keeping pipelined requests while the first
one is answered. Bodies, and whatever comes in chunks, are app.py's to bound.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024  # of one request's line and headers, give or take one read of the socket
MAX_PIPELINED = 16  # requests that wait behind the one being answered


class BoundedHttp(HttpToolsProtocol):
    """One connection; a client beyond the bounds gets 400 and the end of it."""

    _in_head = True
    _head_bytes = 0  # read while a head was incomplete

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        self._head_bytes += len(data) if self._in_head else 0
        if self._head_bytes > MAX_HEAD_BYTES + len(data):
            self._refuse("the request's headers are too large")
        else:
            super().data_received(data)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """A request's headers are there."""
        self._in_head, self._head_bytes = False, 0
        if len(self.pipeline) < MAX_PIPELINED:
            super().on_headers_complete()
        else:
            raise ValueError("too many requests wait on this connection")  # uvicorn: 400, and the end

    def _refuse(self, reason: str) -> None:
        if not self.transport.is_closing():
            self.send_400_response(reason)
