"""The endpoint as a server in a thread, for as long as a `with` lasts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rlhf.gateway.app import App
from rlhf.gateway.calls import Calls
from rlhf.gateway.session import Sessions
from transfer.worker.serve import http_server, listening

ENDS_S = 10.0  # how long requests that are under way may take to end


@dataclass(slots=True)
class Address:
    """Where it listens; its sessions' keys are its tokens."""

    host: str
    port: int = 0
    token: str = "of sessions"


@contextmanager
def serving(sessions: Sessions, calls: Calls, host: str) -> Iterator[str]:
    """Its URL."""
    app = App(sessions, calls)
    with listening(Address(host)) as listener:
        server = http_server(app, sessions)
        server.config.timeout_graceful_shutdown = 1
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="gateway", daemon=True)
        thread.start()
        try:
            yield f"http://{_shown(host)}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(ENDS_S)
            app.close()


def _shown(host: str) -> str:
    """By which programs of this machine reach it."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
