"""A bad network between the trainer and one worker behind HTTP, which also strikes at a step of the protocol."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.faults.mischief import Mischief

LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
DONE_S = 10.0  # deadline of what is asked of the network's thread
STRIKES_S = (0.0, 0.0, 0.0003, 0.001, 0.003)  # after the step


@dataclass
class Trap:
    """Calls `strike` when the message `verb` is about to be forwarded, or has just been answered."""

    verb: str
    answered: bool
    strike: Callable[[], None]


class Network:
    """The thread that all relays run in."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)

    def __enter__(self) -> Network:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.do(_end_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DONE_S)
        self._loop.close()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work`, done in the thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DONE_S)


class Relay:
    """One port that stays the same, however often the worker behind it is started again at another."""

    def __init__(self, network: Network, random: Random) -> None:
        self.worker: int | None = None  # its port
        self.trap: Trap | None = None
        self.mischief = Mischief[bytes](random, verb_of)
        self._network = network
        self._replays: set[asyncio.Task[None]] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server = network.do(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def moved(self, port: int) -> None:
        """The worker was started again, and holds nothing."""
        self.worker = port
        self._network.do(self._replay_later(self.mischief.after_restart(), 0.0))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        forward, task = Forward(self), asyncio.current_task()
        assert task is not None
        self._connections.add(task)  # as for replays: who waits for a stopped worker is waited for by nobody
        try:
            while (answer := await self._answer(forward, await message(reader))) is not None:
                writer.write(answer)
                await writer.drain()
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # one of the two is gone, or the network ends
        finally:
            self._connections.discard(task)
            forward.close()
            writer.close()

    async def _answer(self, forward: Forward, request: bytes) -> bytes | None:
        """The worker's answer, if it is to arrive."""
        self.mischief.remember(request)
        fate = self.mischief.fate(request)
        await self._sprung(request, False)
        if fate == "lose the request":
            await self._replay_later([request], self.mischief.later_s())
            return None
        if fate == "delay":
            await asyncio.sleep(self.mischief.later_s())
        answer = await forward.say(request)
        if fate == "twice":
            answer = self.mischief.random.choice([answer, await forward.say(request)])
        await self._sprung(request, True)
        if fate == "replay":
            await self._replay_later(self.mischief.run(), self.mischief.later_s())
        return None if fate == "lose the answer" else answer

    async def _sprung(self, request: bytes, answered: bool) -> None:
        trap = self.trap
        if trap is not None and (trap.verb, trap.answered) == (verb_of(request), answered):
            self.trap = None
            await asyncio.sleep(self.mischief.random.choice(STRIKES_S))
            trap.strike()

    async def _replay_later(self, requests: list[bytes], delay_s: float) -> None:
        task = asyncio.get_running_loop().create_task(self._replay(requests, delay_s))
        self._replays.add(task)  # the loop itself would forget it
        task.add_done_callback(self._replays.discard)

    async def _replay(self, requests: list[bytes], delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        forward = Forward(self)
        try:
            for request in requests:
                await forward.say(request)
                self.mischief.counts["messages: replayed"] += 1
        except (OSError, EOFError):
            pass  # the worker is gone
        finally:
            forward.close()


class Forward:
    """A connection to the worker, once something is said."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def say(self, request: bytes) -> bytes:
        """The answer; OSError or EOFError if the worker is gone."""
        if self._streams is None:
            if self._relay.worker is None:
                raise ConnectionError("the worker is not there")
            self._streams = await asyncio.open_connection("127.0.0.1", self._relay.worker)
        reader, writer = self._streams
        writer.write(request)
        return await message(reader)

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()


def verb_of(request: bytes) -> str:
    """The verb whose route a request has."""
    return request.split(b" ", 2)[1].removeprefix(b"/").decode()


async def message(reader: asyncio.StreamReader) -> bytes:
    """One HTTP message with its body; EOFError (IncompleteReadError) at the end of the connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = LENGTH.search(head)
    return head + await reader.readexactly(int(length[1]) if length else 0)


async def _end_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
