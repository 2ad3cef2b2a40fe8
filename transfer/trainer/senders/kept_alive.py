"""HTTP/1.1 over connections that stay open: one write a request, and an answer parsed by llhttp as it comes.

After a pause in which a processor has slept, every line of Python costs five times as much: a general client takes half
a millisecond longer for a message than this one. Nothing is repeated here, no redirect followed, no proxy asked.
"""

from __future__ import annotations

import math
import socket
import ssl
import time
from collections import deque
from typing import NamedTuple
from urllib.parse import urlsplit

import httptools

from transfer.agreement import wire

CHUNK = 2**16  # bytes read at a time
SHORT = 2**16  # bytes of a body that goes with its head in one write
MAX_HEAD = 2**16  # bytes of an answer's head, or of all that is no body
MAX_BODY = 8 * 2**20  # bytes of an answer's body, where nobody says otherwise


class NotConnected(OSError):
    """There is no connection to the server, so that it has seen nothing."""


class Unanswered(ConnectionError):
    """A connection that had been used before broke before a byte of the answer came: the server may have ended it."""


class Answer(NamedTuple):
    """What a server says."""

    status: int
    reason: str
    body: bytes
    content_type: str = ""  # without its parameters, in lower case


class KeptAlive:
    """Requests to one server (scheme, host and port of `url`), from any number of threads; OSError if one fails.

    A connection that was idle for more than `idle_s` is not used again: a server that ends idle connections may be
    about to, and what is sent to it then is lost.
    """

    def __init__(self, url: str, idle_s: float = math.inf) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "", parts.port or {"https": 443}.get(parts.scheme, 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.netloc.rpartition("@")[2]
        self._idle_s = idle_s
        self._idle: deque[tuple[socket.socket, float]] = deque()  # and since when

    def request(
        self, method: str, path: str, headers: str, body: bytes, timeout_s: float, most: int = MAX_BODY
    ) -> Answer:
        """Send a request, whose `headers` are lines that end with CR LF, and wait; TimeoutError after `timeout_s`.

        An answer of more than `most` bytes, or in an encoding (gzip), is an error: none was asked for.
        """
        deadline = time.monotonic() + timeout_s
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n{headers}"
        head += f"Content-Length: {len(body)}\r\n\r\n" if method == "POST" else "\r\n"
        connection, used = self._connection(deadline)
        reading = _Reading(most)
        try:
            if len(body) <= SHORT:
                connection.sendall(head.encode("latin-1") + body)
            else:
                connection.sendall(head.encode("latin-1"))
                connection.sendall(body)
            while not reading.complete:
                connection.settimeout(_left(deadline))
                reading.feed(connection.recv(CHUNK))
            answer = reading.answer()
        except httptools.HttpParserError as error:
            connection.close()
            raise ConnectionError(f"the answer is not HTTP: {error}") from None
        except ConnectionError as error:
            connection.close()
            if used and not reading.begun:
                self.close()  # the others have been idle for longer
                raise Unanswered(str(error)) from None
            raise
        except BaseException:
            connection.close()
            raise
        if reading.keeps:
            self._idle.append((connection, time.monotonic()))
        else:
            connection.close()
        return answer

    def close(self) -> None:
        """Close the connections on which nobody waits."""
        while self._idle:
            self._idle.pop()[0].close()

    def _connection(self, deadline: float) -> tuple[socket.socket, bool]:
        """One on which nothing is under way, with the time that is left as its deadline, and whether it was used."""
        while self._idle:
            try:
                connection, since = self._idle.pop()
            except IndexError:
                break  # another thread was faster
            rested = time.monotonic() - since > self._idle_s
            if not rested and not wire.readable(connection.fileno()):
                connection.settimeout(_left(deadline))
                return connection, True
            connection.close()  # the server has ended it, may be about to, or says what nobody has asked
        try:
            connection = socket.create_connection(self._address, _left(deadline))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_hostname=self._address[0])
        except OSError as error:
            raise NotConnected(str(error)) from error
        connection.settimeout(_left(deadline))
        return connection, False


class _Reading:
    """An answer as it comes in: httptools calls the `on_` methods."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._fed = 0
        self._parser = httptools.HttpResponseParser(self)
        self._reason = b""
        self._body = bytearray()
        self._kind = b""
        self._encoding = b""
        self._sized = False
        self._in_body = False
        self.complete = False
        self.keeps = False  # the connection may be used again

    @property
    def begun(self) -> bool:
        """Whether any byte of the answer has come."""
        return self._fed > 0

    def feed(self, data: bytes) -> None:
        """Bytes from the server; b"" is its end."""
        if self._fed > MAX_HEAD + (2 * self._most if self._in_body else 0):  # chunks have heads of their own
            raise ConnectionError(f"the answer has more than the {self._most} bytes that it may have")
        self._fed += len(data)  # of these nobody knows yet where the head ends
        if data:
            self._parser.feed_data(data)
            if len(self._body) > self._most:
                raise ConnectionError(f"the answer has more than the {self._most} bytes that it may have")
        elif self._in_body and not self._sized:
            self.complete = True  # an answer without a length lasts until the connection ends
        else:
            raise ConnectionError("the server has closed it before it had answered")

    def answer(self) -> Answer:
        """The answer, once it is complete."""
        if self._encoding not in (b"", b"identity"):
            raise ConnectionError(f"the answer is encoded, which was not asked for: {self._encoding[:40]!r}")
        kind = self._kind.partition(b";")[0].strip().lower()
        return Answer(
            self._parser.get_status_code(), self._reason.decode("latin-1"), bytes(self._body), kind.decode("latin-1")
        )

    def on_message_begin(self) -> None:
        """Also after a 1xx, which is not the answer yet."""
        self._reason, self._kind, self._sized, self._in_body = b"", b"", False, False

    def on_status(self, reason: bytes) -> None:
        """A part of the reason phrase."""
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        match name.lower():
            case b"content-length" | b"transfer-encoding":
                self._sized = True
            case b"content-type":
                self._kind = value
            case b"content-encoding":
                self._encoding = value.strip().lower()

    def on_headers_complete(self) -> None:
        """All headers are there."""
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body += body

    def on_message_complete(self) -> None:
        """The answer is there."""
        self._in_body = False
        self.complete = self._parser.get_status_code() >= 200
        self.keeps = self._sized and bool(self._parser.should_keep_alive())


def _left(deadline: float) -> float:
    """Seconds until the deadline; TimeoutError if it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
