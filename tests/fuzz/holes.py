"""Faults to plant into a worker, so that a test can see that the fuzz sees them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.rollout.worker import Worker
from transfer.agreement import wire
from transfer.engine import handle_check, handles, inert_pickle
from transfer.engine.chunks import Chunks
from transfer.worker import app
from transfer.worker.receiver import Receiver
from transfer.worker.update import Updates

KEPT: list[Any] = []


def plant(name: str | None) -> None:
    """Put the fault called `name` into this process; None: none."""
    if name is not None:
        HOLES[name]()


def _real_unpickler() -> None:
    import pickle

    def loads(data: bytes) -> Any:
        try:
            return pickle.loads(data)  # noqa: S301 - the hole
        except Exception as error:
            raise ValueError(str(error)) from None

    inert_pickle.loads = loads


def _unchecked_message() -> None:
    check = Receiver.abort_weight_update
    Receiver.abort_weight_update = lambda self, body: check(self, body) if body["version"] >= 0 else {}  # type: ignore


def _memory_leak() -> None:
    refused = wire.Refused.__init__

    def keeping(self: Any, status: int, reason: str) -> None:
        KEPT.append(bytearray(64 * 1024))
        refused(self, status, reason)

    wire.Refused.__init__ = keeping  # type: ignore[method-assign]


def _descriptor_leak() -> None:
    mapped = handles._map

    def leaking(pid: int, fd: int, inode: int) -> Any:
        KEPT.append(os.dup(0))
        return mapped(pid, fd, inode)

    handles._map = leaking


def _torn_weights() -> None:
    write = Updates._write_weights

    def partly(self: Updates) -> None:
        self._staged = dict(list(self._staged.items())[1:])
        write(self)

    Updates._write_weights = partly  # type: ignore[method-assign]


def _nameless_refusal() -> None:
    error = app._error
    app._error = lambda status, reason: error(status, "" if status == 409 else reason)


def _file_by_name() -> None:
    wake_up = Worker.wake_up

    def noting(self: Worker, body: Any) -> Any:
        name = str(body.get("tags", "none")).strip("/.\0")[:20].encode(errors="replace").hex()
        (Path(tempfile.gettempdir()) / f"fuzz-hole-{name}").write_text("")
        os.remove(Path(tempfile.gettempdir()) / f"fuzz-hole-{name}")
        return wake_up(self, body)

    Worker.wake_up = noting  # type: ignore[method-assign]


def _address_by_message() -> None:
    init = Receiver.init_weight_transfer_engine

    def calling(self: Receiver, body: Any) -> Any:
        if "url" in str(body):
            with socket.socket() as connection, contextlib.suppress(OSError):
                connection.connect(("127.0.0.1", 9))
        return init(self, body)

    Receiver.init_weight_transfer_engine = calling  # type: ignore[method-assign]


def _any_unicode() -> None:
    app._encoded = lambda answer: json.dumps(answer, ensure_ascii=False).encode()


def _incomplete_one_shot() -> None:
    Chunks.check_complete = lambda self: None  # type: ignore[method-assign]


def _printed_whole() -> None:
    handle_check.shown = lambda value, limit=80: str(value)[:limit]


def _calls_without_a_sum() -> None:
    inert_pickle._Reader.encoded = property(lambda self: 0, lambda self, count: None)  # type: ignore[assignment]


def _shapes_without_a_bound() -> None:
    require = handle_check.require
    handle_check.require = lambda holds, otherwise: require(holds or "bytes together" in otherwise, otherwise)


HOLES: dict[str, Callable[[], None]] = {
    "a real unpickler": _real_unpickler,
    "an unchecked message": _unchecked_message,
    "a memory leak": _memory_leak,
    "a descriptor leak": _descriptor_leak,
    "torn weights": _torn_weights,
    "a refusal without a reason": _nameless_refusal,
    "a file named by a message": _file_by_name,
    "a connection that a message asks for": _address_by_message,
    "strings that cannot be encoded": _any_unicode,
    "values that are printed whole": _printed_whole,
    "calls of which only each is bounded": _calls_without_a_sum,
    "shapes without a bound": _shapes_without_a_bound,
    "incomplete one-shot weights": _incomplete_one_shot,
}
