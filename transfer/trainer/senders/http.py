"""Sender over HTTP: one kept-alive client a worker; our worker and a stock vLLM server have the same routes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

from transfer.agreement import wire
from transfer.trainer import answers
from transfer.trainer.senders.kept_alive import Answer, KeptAlive, NotConnected, Unanswered

REPEATABLE = {verb for verb, (method, _) in wire.ROUTES.items() if method == "GET"} | {
    "init_weight_transfer_engine",
    "start_weight_update",
    "finish_weight_update",
    "abort_weight_update",
    "withdraw_weights",
}  # what a worker does once, however often it is told
Relaunch = Callable[[], str | None]  # starts a dead worker again and gives its URL; None if it lives, or cannot be


class HttpSender:
    """POSTs (or GETs) `wire.ROUTES` at `url` with a bearer token; may be called from several threads at once.

    No proxy, no cookies, no redirects: the token goes to the worker alone.
    """

    remote = True  # a message takes time, and `call` returns by its deadline

    def __init__(
        self, url: str, token: str | None, worker: str, timeout_s: float, relaunch: Relaunch | None = None
    ) -> None:
        self._worker = worker
        self._relaunch = relaunch
        self._timeout_s = timeout_s
        self._headers = "Content-Type: application/json\r\n"
        if token is not None:
            self._headers += f"Authorization: Bearer {token}\r\n"
        self._move(url)

    def call(self, verb: str, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """The worker's answer; RemoteError with the worker's own message, status 0 if none came in time."""
        deadline = self._timeout_s if timeout_s is None else timeout_s
        try:
            answer = self._asked(verb, body, time.monotonic() + deadline)
        except NotConnected as error:
            raise wire.RemoteError(self.name, verb, 0, f"no connection to {self._url}: {error}") from None
        except TimeoutError:
            raise wire.RemoteError(self.name, verb, 0, f"no answer within {deadline:g} s") from None
        except OSError as error:
            raise wire.RemoteError(self.name, verb, 0, f"the connection to {self._url} broke: {error}") from None
        if answer.status != 200:
            raise wire.RemoteError(self.name, verb, answer.status, answers.words(answer.body, answer.reason))
        if answer.content_type == wire.COLUMNS_TYPE:
            return answers.checked(self.name, verb, wire.handed_on(answer.body))
        return answers.checked(self.name, verb, answers.parsed(self.name, verb, answer.body))

    def _asked(self, verb: str, body: Mapping[str, Any], ends: float) -> Answer:
        """The answer over a connection of earlier messages or, where the worker has just ended that, a new one."""
        method, path = wire.ROUTES[verb]
        payload = json.dumps(body, separators=(",", ":")).encode() if method == "POST" else b""
        if method == "GET" and body:
            path += "?" + urlencode(body)
        request = method, self._prefix + path, self._headers, payload
        try:
            return self._server.request(*request, ends - time.monotonic(), answers.most_bytes(body))
        except Unanswered:
            if verb not in REPEATABLE:
                raise
            return self._server.request(*request, ends - time.monotonic(), answers.most_bytes(body))

    def restart(self) -> bool:
        """Start a worker anew that has died, if this sender was told how: it may then be at another address."""
        url = None if self._relaunch is None else self._relaunch()
        if url is not None:
            self._server.close()
            self._move(url)
        return url is not None

    def _move(self, url: str) -> None:
        self._url = url.rstrip("/")
        self.name = f"{self._worker} ({self._url})"
        self._prefix = urlsplit(self._url).path
        self._server = KeptAlive(self._url)

    def close(self) -> None:
        """Close the connections."""
        self._server.close()
