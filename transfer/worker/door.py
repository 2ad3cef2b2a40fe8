"""Who may be connected to a worker: few without its token, none for long, and always one more.

uvicorn has no deadline for a request's head or body, no limit of connections but one that shuts everybody out, and
asyncio's own accepting, out of descriptors, writes thousands of lines a second (python/cpython#151615). So connections
are accepted here. Those that have not shown the token are *strangers*: where there are as many as may be, the one that
has been silent longest makes room for the next, after the moment that a client needs to send its request.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, Protocol

import uvicorn

from transfer.worker.bearer import Bearer
from transfer.worker.repeats import Repeats

LOG = logging.getLogger(__name__)
MAX_STRANGERS = 64
MOMENT_S = 0.02  # that every stranger has, before it may have to make room
PACE_S = 0.001  # between two that make room: letting strangers in is not to keep the worker from its work
AGAIN_S = 0.2  # until connections are accepted again after it has failed
SWEEP_S = 1.0  # between two looks for connections whose time is over
LOGGERS = (__name__, "uvicorn.error", "asyncio")  # in which strangers can make a worker write


class Connection(Protocol):
    """An HTTP connection, as the door sees it."""

    def overdue(self, now: float) -> bool: ...
    def unread(self) -> bool: ...
    def drop(self) -> None: ...


class Door:
    """The strangers of one server; connections report what they do."""

    def __init__(self, bearer: Bearer, most: int | None = None) -> None:
        self.bearer = bearer
        self._most = most_strangers() if most is None else most
        self._strangers: dict[Connection, float] = {}  # and since when it is connected; the longest silent is first
        self._spared: set[Connection] = set()  # since it was last answered

    def came(self, connection: Connection, now: float) -> None:
        """Somebody has connected."""
        self._strangers[connection] = now

    def known(self, connection: Connection) -> None:
        """It is no stranger: it has shown the token, or its request is whole where there is no token to show."""
        self._strangers.pop(connection, None)

    def answered(self, connection: Connection, now: float) -> None:
        """It is silent from now on."""
        self._spared.discard(connection)
        self._strangers[connection] = self._strangers.pop(connection, now)

    def left(self, connection: Connection) -> None:
        """Its connection is gone."""
        self._spared.discard(connection)
        self._strangers.pop(connection, None)

    async def let_in(self, listener: socket.socket, make: Callable[[], asyncio.Protocol]) -> None:
        """Accept connections, for ever."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
                try:
                    while len(self._strangers) >= self._most:
                        await self._make_room(loop.time())
                    await loop.connect_accepted_socket(make, accepted)
                except BaseException:
                    accepted.close()
                    raise
            except OSError as error:  # it has gone already, or no descriptor is free: then the others wait their turn
                LOG.warning("a connection could not be accepted: %s", error.strerror)
                await self._make_room(loop.time())
                await asyncio.sleep(AGAIN_S)

    def sweep(self, connections: Collection[Any], now: float) -> None:
        """End those of these connections whose time is over."""
        for connection in [each for each in connections if each.overdue(now)]:
            self._end(connection, "a client that kept this worker waiting was disconnected")

    async def _make_room(self, now: float) -> None:
        first = next(iter(self._strangers), None)
        if first is None or now - self._strangers[first] < MOMENT_S:
            await asyncio.sleep(MOMENT_S)
            return
        if first not in self._spared and first.unread():
            self._spared.add(first)
            self._strangers[first] = self._strangers.pop(first)
            await asyncio.sleep(0)  # in which it is read
            return
        self._end(first, "a client without the token was disconnected, to make room for another")
        await asyncio.sleep(PACE_S)

    def _end(self, connection: Connection, why: str) -> None:
        LOG.warning(why)
        self.left(connection)
        connection.drop()


def most_strangers() -> int:
    """How many may be connected: half of the descriptors that are free now, so that the other half is the worker's."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = MAX_STRANGERS
    with suppress(OSError):  # not Linux
        used = len(os.listdir("/proc/self/fd"))
    free = MAX_STRANGERS * 2 if limit == resource.RLIM_INFINITY else limit - used
    return max(1, min(MAX_STRANGERS, free // 2))


class Server(uvicorn.Server):
    """uvicorn's server, to which connections come through a door."""

    def __init__(self, config: uvicorn.Config, door: Door) -> None:
        super().__init__(config)
        self._door = door
        self._repeats = Repeats(LOGGERS)
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections on `sockets`."""
        await super().startup(sockets=[])  # all but the accepting
        loop = asyncio.get_running_loop()

        def make() -> asyncio.Protocol:
            protocol: Any = self.config.http_protocol_class
            return protocol(
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop
            )

        work = [self._door.let_in(listener, make) for listener in sockets or []]
        self._tasks = [asyncio.create_task(each) for each in (*work, self._sweep())]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and let what is under way end."""
        for task in self._tasks:
            task.cancel()
        await super().shutdown(sockets)

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            self._door.sweep(self.server_state.connections, loop.time())
            self._repeats.tell()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():  # a server that nobody can reach must not look alive
            LOG.error("the worker can accept no connections any more", exc_info=task.exception())
            self.should_exit = True
