"""Sender over HTTP: one kept-alive client a worker; our worker and a stock vLLM server have the same routes."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.cookiejar import DefaultCookiePolicy
from typing import Any

from transfer import wire


class HttpSender:
    """POSTs (or GETs) `wire.ROUTES` at `url` with a bearer token; may be called from several threads at once.

    urllib3, below requests, sets TCP_NODELAY on every connection and repeats nothing by itself.
    """

    def __init__(self, url: str, token: str | None, name: str, timeout_s: float) -> None:
        import requests

        self.name = name
        self.bytes_sent = 0  # bodies only
        self.bytes_received = 0
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # of the two counters
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy, no netrc: the token goes to the worker alone
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        if token is not None:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def call(self, verb: str, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """The worker's JSON answer; RemoteError with the worker's own message, status 0 if none came in time."""
        import requests

        method, path = wire.ROUTES[verb]
        deadline = self._timeout_s if timeout_s is None else timeout_s
        payload = json.dumps(body).encode() if method == "POST" else b""
        try:
            answer = self._session.request(
                method,
                self._url + path,
                params=dict(body) if method == "GET" else None,
                data=payload or None,
                headers={"Content-Type": "application/json"},
                timeout=deadline,
                allow_redirects=False,
            )
        except requests.Timeout:
            raise wire.RemoteError(self.name, verb, 0, f"no answer within {deadline:g} s") from None
        except requests.RequestException as error:
            raise wire.RemoteError(self.name, verb, 0, f"no connection to {self._url}: {error}") from None
        with self._lock:
            self.bytes_sent += len(payload)
            self.bytes_received += len(answer.content)
        if answer.status_code != 200:
            raise wire.RemoteError(self.name, verb, answer.status_code, _message(answer.content, answer.reason))
        return _parsed(answer.content, self.name, verb)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()


def _parsed(raw: bytes, name: str, verb: str) -> dict[str, Any]:
    """The JSON object of an answer; {} for an empty one and for other JSON, with which a stock server confirms."""
    try:
        value = json.loads(raw) if raw else {}
    except ValueError:
        raise wire.RemoteError(name, verb, 0, f"the answer is not JSON: {raw[:200]!r}") from None
    return value if isinstance(value, dict) else {}


def _message(raw: bytes, fallback: str) -> str:
    """The server's own words: {"detail": ...}, {"error": ...}, {"error": {"message": ...}}, or plain text."""
    text = raw.decode(errors="replace")
    try:
        value = json.loads(text)
    except ValueError:
        return text.strip()[:2000] or fallback
    while isinstance(value, dict):
        value = value.get("detail") or value.get("error") or value.get("message") or text
    return str(value)[:2000]
