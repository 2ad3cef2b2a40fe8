"""uvicorn's HTTP/1.1 with bounds on what a client may send, and how slowly, and a short way.

By itself uvicorn keeps request headers of any size, waits for ever for the rest of a request, and goes on reading and
keeping pipelined requests while the first one is answered. Bodies, and whatever comes in chunks, are app.py's to bound;
how many connections there are is door.py's.

The short way is for messages of an update that are done at once: they are answered right here, in one write, without an
ASGI task and a thread. It is taken by requests that look as our sender makes them; all others go uvicorn's way.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from transfer.agreement.wire import readable
from transfer.worker.door import Door

MAX_HEAD_BYTES = 64 * 1024  # of one request's line and headers, give or take one PIECE
PIECE = 16 * 1024  # bytes parsed at a time
MAX_HEADERS = 100  # of one request; a header takes more memory than bytes
MAX_PIPELINED = 16  # requests that wait behind the one being answered
HEAD_S = 10.0  # for a whole head: since its first byte, of a stranger since it has connected or was answered
STALL_S = 20.0  # for STEP more bytes, or all, of a body, and for the client to read some of an answer
STEP = 64 * 1024
SHORT = {b"host", b"content-type", b"content-length", b"authorization"}  # the headers of a request on the short way


class Part(enum.Enum):
    """What of a request a client sends."""

    none = enum.auto()
    head = enum.auto()
    body = enum.auto()


class ShortWay(Protocol):
    """What answers at once."""

    def admits(self, method: bytes, path: bytes, authorization: list[bytes], nbytes: int) -> bool: ...
    def answer(self, method: bytes, path: bytes, body: bytearray) -> tuple[int, bytes] | None: ...


class BoundedHttp(HttpToolsProtocol):
    """One connection; a client beyond the bounds gets 400, or nothing, and the end of it."""

    door: Door
    short_way: ShortWay | None = None
    _known = False  # has shown the token, or, where there is none, made a request
    _part = Part.none  # of a request, that has begun and not ended
    _head_bytes = 0  # of a head that is incomplete
    _body_bytes = 0  # since `_since`
    _since = 0.0  # when the client was last seen to do what is waited for
    _unread = 0  # bytes of answers that the client had not read at the last look
    _held: bytearray | None = None  # the body of a request that may go the short way

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody has connected."""
        super().connection_made(transport)
        self._since = self.loop.time()
        self.door.came(self, self._since)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.door.left(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            super().data_received(piece)
            if self.transport.is_closing():
                return
            self._head_bytes += len(piece) if self._part is Part.head else 0
            if self._head_bytes > MAX_HEAD_BYTES + PIECE:
                self._refuse("the request's headers are too large")
                return

    def overdue(self, now: float) -> bool:
        """Whether this worker has waited too long for the client."""
        unread, self._unread = self._unread, self.transport.get_write_buffer_size()
        if self._unread:
            if self._unread != unread:
                self._since = now
            return now - self._since > STALL_S
        if self._part is Part.body:
            return now - self._since > STALL_S
        if self._busy() or (self._known and self._part is Part.none):
            return False
        return now - self._since > HEAD_S

    def unread(self) -> bool:
        """Whether the client has sent something, or gone, that this worker has not come to read."""
        return not self.transport.is_closing() and readable(self.transport.get_extra_info("socket").fileno())

    def drop(self) -> None:
        """End the connection at once."""
        self.transport.abort()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._part, self._head_bytes, self._held = Part.head, 0, None
        if self._known:
            self._since = self.loop.time()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        if len(self.headers) == MAX_HEADERS:
            raise ValueError("too many headers")  # uvicorn: 400, and the end
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request's headers are there."""
        self._part, self._body_bytes, self._since = Part.body, 0, self.loop.time()
        self._recognize()
        if self._may_be_short():
            self._held = bytearray()
        elif len(self.pipeline) < MAX_PIPELINED:
            super().on_headers_complete()
        else:
            raise ValueError("too many requests wait on this connection")  # uvicorn: 400, and the end

    def on_body(self, body: bytes) -> None:
        """A part of a request's body; of one without the token nobody will read it."""
        self._body_bytes += len(body)
        if self._body_bytes >= STEP:
            self._body_bytes, self._since = 0, self.loop.time()
        if self._held is not None:
            self._held += body
        elif self._known:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is there."""
        self._part = Part.none
        if not self.door.bearer.needed:
            self.door.known(self)
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

    def on_response_complete(self) -> None:
        """A request is answered."""
        self._since = self.loop.time()
        if not (self._known and self.door.bearer.needed):
            self.door.answered(self, self._since)
        super().on_response_complete()

    def _recognize(self) -> None:
        """See whether a request has the token."""
        if not self._known and self.door.bearer.allows([v for name, v in self.headers if name == b"authorization"]):
            self._known = True
            if self.door.bearer.needed:
                self.door.known(self)

    def _busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _may_be_short(self) -> bool:
        """Whether nothing is before this request, and nothing about it unusual."""
        if self.short_way is None or self._busy() or self.pipeline or self.parser.get_http_version() != "1.1":
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
