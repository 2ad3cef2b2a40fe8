"""Around a run in somebody's program: what it changes of the process is afterwards as it was before.

Torch's threads, random generators and choice of attention, Python's and numpy's generators, handlers of signals, and
whether transformers shows bars. What stays is a process's alone once it is made: modules, and a thread of asyncio for
rewards.
"""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf.shell.ending import STOPS, RunError, terminate_as_interrupt

_running = threading.Lock()  # random generators, threads and signals are a process's


@contextmanager
def alone_in_process() -> Iterator[None]:
    """RunError if another thread is in this block."""
    if not _running.acquire(blocking=False):
        raise RunError("another rlhf.train of this process has not ended: wait for it, or start it in a process")
    try:
        yield
    finally:
        _running.release()


@contextmanager
def as_it_was() -> Iterator[None]:
    """Put back what a run changes."""
    import torch
    from transformers.utils import logging

    from rlhf.checkpoint.state import random_state, restore_random

    threads, state = torch.get_num_threads(), random_state()
    planned, bars = torch.backends.cuda.cudnn_sdp_enabled(), logging.is_progress_bar_enabled()
    try:
        with _signals():
            yield
    finally:
        torch.set_num_threads(threads)
        restore_random(state)
        torch.backends.cuda.enable_cudnn_sdp(planned)
        if bars:
            logging.enable_progress_bar()
        gc.unfreeze()  # what a run has frozen, as if it were the process's only one
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@contextmanager
def _signals() -> Iterator[None]:
    """Signals end a run in order where they would end the process at once; only the main thread can take them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOPS}
    terminate_as_interrupt()
    for number, handler in before.items():
        if callable(handler):  # the program has one of its own
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # else it is none of Python's
                signal.signal(number, handler)
