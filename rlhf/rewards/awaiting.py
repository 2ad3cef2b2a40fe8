"""Coroutines beside the run: one event loop in a thread of its own, for as long as the process lives."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from rlhf.shell.apart import LateError


def begun(coroutine: Awaitable[Any], timeout_s: float) -> Callable[[], Any]:
    """Let it run from now on; what is returned waits for its result, and raises what it raises, or LateError."""
    until = time.monotonic() + timeout_s
    future = asyncio.run_coroutine_threadsafe(_awaited(coroutine), _loop())

    def result() -> Any:
        try:
            return future.result(max(0.0, until - time.monotonic()))
        except TimeoutError:
            if future.done():
                raise  # its own
            future.cancel()
            raise LateError from None

    return result


async def _awaited(coroutine: Awaitable[Any]) -> Any:
    return await coroutine


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The same for all, as clients that a function keeps belong to the loop in which they were made."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
