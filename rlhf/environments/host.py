"""The process that holds instances of a user's class: makes them, calls their methods, and tells what came of it.

    python -m rlhf.environments.host DESCRIPTOR        a pipe of whoever asks

Asked are (number, row, verb, name, arguments), the last pickled by themselves: "make" an instance, and call its method
if one is named; "call" one; "drop" it, which closes it.
Told is JSON: [number, null, value], or [number, error, null]. Calls of several rows run at the same time: coroutines in
one loop, other functions each in a thread. It ends with whoever asks, also when that is killed.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import json
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

PR_SET_PDEATHSIG = 1


class Host:
    """The instances, by row; its methods are called in the loop's thread."""

    def __init__(self, pipe: Connection, make: Callable[[], Any], calls: int) -> None:
        self._pipe, self._make = pipe, make
        self._instances: dict[int, Any] = {}
        self._threads = ThreadPoolExecutor(calls, thread_name_prefix="environment")

    async def carry_out(self, number: int, row: int, verb: str, name: str, given: bytes) -> None:
        """Do one thing that was asked, and tell."""
        try:
            arguments = pickle.loads(given)  # noqa: S301 - of whoever asks; its classes may not be here
            match verb:
                case "make":
                    instance = self._instances[row] = await self._called(self._make)
                    value = await self._called(getattr(instance, name), **arguments) if name else None
                case "call":
                    value = await self._called(getattr(self._instances[row], name), **arguments)
                case _:
                    instance = self._instances.pop(row, None)
                    value = await self._called(instance.close) if hasattr(instance, "close") else None
            told = json.dumps([number, None, value], default=str)
        except BaseException as error:  # whatever the user's code raises, SystemExit too: others' rows are here
            told = json.dumps([number, told_of(error), None])
        self._pipe.send_bytes(told.encode())

    async def _called(self, function: Callable[..., Any], **arguments: Any) -> Any:
        if inspect.iscoroutinefunction(function):
            return await function(**arguments)
        loop = asyncio.get_running_loop()
        value = await loop.run_in_executor(self._threads, lambda: called(function, arguments))
        return await value if inspect.isawaitable(value) else value


def called(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What the function returns; a future cannot have StopIteration."""
    try:
        return function(**arguments)
    except StopIteration as error:
        raise RuntimeError(f"StopIteration: {error}") from error


def told_of(error: BaseException) -> str:
    """An exception on one line, with where it was raised."""
    places = traceback.extract_tb(error.__traceback__)
    own = next((place for place in reversed(places) if place.filename != __file__), places[-1])
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({os.path.basename(own.filename)}:{own.lineno})"


def serve(descriptor: int) -> None:
    """Carry out what is asked until whoever asks has gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    pipe = Connection(descriptor)
    named, sys.path[:], calls, parent = pipe.recv()
    if os.getppid() != parent:
        return
    from rlhf.environments.factory import instance_maker

    try:
        make = instance_maker(*named)
    except BaseException as error:
        pipe.send_bytes(json.dumps([0, told_of(error), None]).encode())
        return
    pipe.send_bytes(json.dumps([0, None, None]).encode())
    asyncio.run(_serve(pipe, Host(pipe, make, calls)))


async def _serve(pipe: Connection, host: Host) -> None:
    loop, running = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    def begin(asked: tuple[Any, ...]) -> None:
        task = loop.create_task(host.carry_out(*asked))
        running.add(task)
        task.add_done_callback(running.discard)

    def hear() -> None:
        try:
            while True:
                loop.call_soon_threadsafe(begin, pipe.recv())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=hear, daemon=True).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
