"""Reads the live weights of one worker all the time: what a sampler would be seen to do with them."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from tests.faults.ledger import Read
from transfer.agreement.wire import ROUTES

PAUSE_S = 0.002
TIMEOUT_S = 10.0


class Ask(Protocol):
    """A worker's answer to a verb; None if it refuses (503); OSError if it is gone."""

    def __call__(self, verb: str) -> dict[str, Any] | None: ...
    def close(self) -> None: ...


class Reader(threading.Thread):
    """One worker's reader, from `start` to `close`."""

    def __init__(self, worker: int, ask: Ask) -> None:
        super().__init__(name=f"reader-{worker}", daemon=True)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._worker, self._ask = worker, ask
        self._reads: list[Read] = []
        self._ended = threading.Event()

    def run(self) -> None:
        """Ask again and again."""
        while not self._ended.wait(PAUSE_S):
            began = time.monotonic()
            try:
                answer = self._ask("completions")
            except OSError:
                self.counts["unanswered"] += 1
                continue
            except Exception as error:
                self.wrong.append(f"worker {self._worker}: completions: {error!r}")
                return
            if answer is None:
                self.counts["refused"] += 1
                continue
            self.counts["answered"] += 1
            self._reads.append(Read(self._worker, began, time.monotonic(), answer["version"], answer["digest"]))

    def taken(self) -> list[Read]:
        """The answers since the last call."""
        reads, self._reads = self._reads, []
        return reads

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self.join(TIMEOUT_S + 5)
        assert not self.is_alive(), f"{self.name} does not end"
        self._ask.close()


class HttpAsk:
    """Asks a worker behind HTTP, for one thread; `port` is None while there is no worker."""

    def __init__(self, port: Callable[[], int | None], token: str) -> None:
        self._port = port
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._connection: http.client.HTTPConnection | None = None

    def __call__(self, verb: str) -> dict[str, Any] | None:
        """The answer to a verb with an empty message."""
        port = self._port()
        if port is None:
            raise ConnectionError("no worker yet")
        if self._connection is None or self._connection.port != port:
            self.close()
            self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        method, path = ROUTES[verb]
        try:
            self._connection.request(method, path, b"{}" if method == "POST" else None, self._headers)
            answer = self._connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise ConnectionError(str(error)) from error
        if answer.status == 503:
            return None
        assert answer.status == 200, f"{answer.status}: {body!r}"
        return json.loads(body)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
