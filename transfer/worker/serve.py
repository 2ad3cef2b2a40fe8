"""The process around a worker: takes a port, reports it, serves HTTP, and ends with its parent."""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import uvicorn

    from transfer.worker.app import AtOnce
    from transfer.worker.bearer import Bearer

PR_SET_PDEATHSIG = 1  # linux/prctl.h
BACKLOG = 4096  # connections that wait in the kernel; it takes net.core.somaxconn at most
OF_PARENT = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)  # which a worker leaves to it; SIGUSR1 asks for stacks


class Address(Protocol):
    """Where a worker is to listen, and who may call."""

    host: str
    port: int  # 0: a free one
    token: str  # bearer token; empty: whoever reaches the loopback port may call


def serve_alone(spec: Address, build: Callable[[], Any]) -> None:
    """Serve the worker that `build` makes, until SIGTERM or Ctrl-C."""
    with listening(spec) as listener:
        server = _server(build(), spec.token)
        print(f"rollout worker on http://{spec.host}:{listener.getsockname()[1]}", flush=True)
        server.run(sockets=[listener])


def serve_parent(spec: Address, build: Callable[[], Any]) -> None:
    """Serve the process that started this one: report `{"port": N}` as a line of stdout, and end when stdin ends.

    The parent holds the other end of stdin and writes no more to it: the end comes when the parent closes it or dies,
    in whatever way. Signals that tell all processes of a job of its end are for the parent, which decides.
    """
    for signum in OF_PARENT:
        signal.signal(signum, signal.SIG_IGN)
    die_with_parent()
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    with listening(spec) as listener:
        server = _server(build(), spec.token)
        threading.Thread(target=_run, args=(server, listener), daemon=True).start()
        with report:
            print(json.dumps({"port": listener.getsockname()[1]}), file=report)
        while sys.stdin.buffer.read(4096):
            pass
    os._exit(0)  # at once: threads may be sampling, and nothing here outlives the process


def listening(spec: Address) -> socket.socket:
    """A listening socket on the spec's address; ValueError for one beyond loopback without a token."""
    if not spec.token and not _is_loopback(spec.host):
        raise ValueError(
            f"a worker on {spec.host} can be reached from other machines and needs a token: set token in its spec, "
            "or host to 127.0.0.1"
        )
    listener = socket.create_server((spec.host, spec.port), backlog=BACKLOG)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted connections inherit it
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _server(worker: Any, token: str) -> uvicorn.Server:
    from transfer.worker.app import AtOnce, make_app
    from transfer.worker.bearer import Bearer

    return http_server(make_app(worker, token), Bearer(token), AtOnce(worker, token))


def http_server(app: Any, bearer: Bearer, at_once: AtOnce | None = None) -> uvicorn.Server:
    """A bounded server of an ASGI app, in which who does not pass `bearer` is a stranger."""
    import uvicorn

    from transfer.worker.bounded_http import BoundedHttp
    from transfer.worker.door import Door, Server

    class Http(BoundedHttp):
        door = Door(bearer)
        short_way = at_once

    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=Http,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=3600,  # a trainer's connection stays between two steps, however long the step
    )
    return Server(config, Http.door)


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    try:
        server.run(sockets=[listener])  # not in the main thread, so it leaves the signals alone
    finally:
        os._exit(1)  # a worker that cannot serve is dead, and must look dead


def die_with_parent() -> None:
    """Linux: be killed when the parent thread ends, for the case that another child of it holds our stdin open."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
