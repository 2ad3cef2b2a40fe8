"""uvicorn's HTTP/1.1 with bounds on what a client may send before anybody has looked at its token, and a short way.

By itself uvicorn keeps request headers of any size, and goes on reading and keeping pipelined requests while the first
one is answered. Bodies, and whatever comes in chunks, are app.py's to bound.

The short way is for messages of an update that are done at once: they are answered right here, in one write, without an
ASGI task and a thread. It is taken by requests that look as our sender makes them; all others go uvicorn's way.
"""

from __future__ import annotations

from typing import Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024  # of one request's line and headers, give or take one read of the socket
MAX_PIPELINED = 16  # requests that wait behind the one being answered
SHORT = {b"host", b"content-type", b"content-length", b"authorization"}  # the headers of a request on the short way


class ShortWay(Protocol):
    """What answers at once."""

    def admits(self, method: bytes, path: bytes, authorization: list[bytes], nbytes: int) -> bool: ...
    def answer(self, method: bytes, path: bytes, body: bytearray) -> tuple[int, bytes] | None: ...


class BoundedHttp(HttpToolsProtocol):
    """One connection; a client beyond the bounds gets 400 and the end of it."""

    short_way: ShortWay | None = None
    _in_head = True
    _head_bytes = 0  # read while a head was incomplete
    _held: bytearray | None = None  # the body of a request that may go the short way

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
        self._in_head, self._head_bytes, self._held = True, 0, None

    def on_headers_complete(self) -> None:
        """A request's headers are there."""
        self._in_head, self._head_bytes = False, 0
        if self._may_be_short():
            self._held = bytearray()
        elif len(self.pipeline) < MAX_PIPELINED:
            super().on_headers_complete()
        else:
            raise ValueError("too many requests wait on this connection")  # uvicorn: 400, and the end

    def on_body(self, body: bytes) -> None:
        """A part of a request's body."""
        if self._held is None:
            super().on_body(body)
        else:
            self._held += body

    def on_message_complete(self) -> None:
        """A request is there."""
        held, self._held = self._held, None
        if held is not None:
            assert self.short_way is not None
            said = self.short_way.answer(self.parser.get_method(), self.url, held)
            if said is not None:
                self._answer(*said)
                return
            super().on_headers_complete()
            if held:
                super().on_body(bytes(held))
        super().on_message_complete()

    def _may_be_short(self) -> bool:
        """Whether nothing is before this request, and nothing about it unusual."""
        busy = self.cycle is not None and not self.cycle.response_complete
        if self.short_way is None or busy or self.pipeline or self.parser.get_http_version() != "1.1":
            return False
        headers = dict(self.headers)
        if len(headers) != len(self.headers) or not headers.keys() <= SHORT or not self.parser.should_keep_alive():
            return False
        nbytes, token = headers.get(b"content-length", b"0"), headers.get(b"authorization")
        method, tokens = self.parser.get_method(), [] if token is None else [token]
        return nbytes.isdigit() and self.short_way.admits(method, self.url, tokens, int(nbytes))

    def _answer(self, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.on_response_complete()

    def _refuse(self, reason: str) -> None:
        if not self.transport.is_closing():
            self.send_400_response(reason)
