"""What goes over the control plane: the routes, strict JSON, and the errors both sides know.

A worker has one method per verb, with a JSON object in and a JSON object out; over HTTP the verb is a route (vLLM's,
where vLLM has it), on a Ray actor it is the method's name. A refusal carries an HTTP status and one clear line.

One answer may be bytes instead, `Binary`: over HTTP the whole body under a content type of its own, over any other
sender the value of `BODY` in the answer, as all senders hand it on.

Who may call: every verb but `health` needs the run's bearer token over HTTP. 401 no or wrong token, 409 conflict with
the worker's state, 413 body too large, 422 the message is not of the verb's form, 503 nothing to serve yet.
"""

from __future__ import annotations

import json
import select
from collections.abc import Callable
from typing import Any

from transfer.agreement.shown import one_line, shown

TOKEN_VARIABLE = (
    "RLHF_WORKER_TOKEN"  # the environment variable with a worker's bearer token, where nobody hands it over
)
MAX_CONTROL_BYTES = 8 * 2**20  # body of one control message
MAX_CONTAINERS = 2**20  # lists and objects in a message: three bytes of it become 64 or more of memory
BODY = "body"  # key of the bytes in an answer that is bytes
COLUMNS_TYPE = "application/vnd.rlhf.columns"  # content type of completions as columns
MAX_REASON = 2000  # characters of an error's message
MAX_LOGPROB = 0.01  # nats; more is no rounding
MAX_INT = 2**64 - 1  # any number in a message: no arithmetic on it becomes too long to print

ROUTES: dict[str, tuple[str, str]] = {  # verb -> (HTTP method, path)
    "health": ("GET", "/health"),
    "completions": ("POST", "/v1/completions"),
    "get_world_size": ("GET", "/get_world_size"),
    "init_weight_transfer_engine": ("POST", "/init_weight_transfer_engine"),
    "start_weight_update": ("POST", "/start_weight_update"),
    "update_weights": ("POST", "/update_weights"),
    "finish_weight_update": ("POST", "/finish_weight_update"),
    "abort_weight_update": ("POST", "/abort_weight_update"),  # ours: vLLM has no abort
    "withdraw_weights": ("POST", "/withdraw_weights"),  # ours: the memory of the weights is about to change
    "weight_info": ("GET", "/weight_info"),
    "status": ("GET", "/status"),  # ours: phase, epoch, version, digest
    "pause": ("POST", "/pause"),
    "resume": ("POST", "/resume"),
    "is_paused": ("GET", "/is_paused"),
    "sleep": ("POST", "/sleep"),
    "wake_up": ("POST", "/wake_up"),
    "is_sleeping": ("GET", "/is_sleeping"),
    "start_profile": ("POST", "/start_profile"),
    "stop_profile": ("POST", "/stop_profile"),
    "version": ("GET", "/version"),
}


class Binary(bytes):
    """An answer that is no JSON object, with the content type under which it goes over HTTP."""

    content_type: str

    def __new__(cls, content: bytes, content_type: str) -> Binary:
        made = super().__new__(cls, content)
        made.content_type = content_type
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Binary, (bytes(self), self.content_type)


def handed_on(answer: Any) -> dict[str, Any]:
    """A worker's answer as a sender hands it on: bytes become {BODY: bytes}."""
    return {BODY: bytes(answer)} if isinstance(answer, bytes) else answer


class Refused(Exception):
    """A worker's answer to a message it will not carry out; `status` is the HTTP status, `str` the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)  # both in args, so that it survives Ray's pickling
        self.status = status
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class RemoteError(RuntimeError):
    """A call to a worker that was refused (`status` from the worker), or never answered (`status` 0)."""

    def __init__(self, worker: str, verb: str, status: int, reason: str) -> None:
        reason = one_line(reason)
        super().__init__(f"{worker}: {verb}: {reason}" + (f" (status {status})" if status else ""))
        self.worker = worker
        self.verb = verb
        self.status = status
        self.reason = reason


class TransferError(RuntimeError):
    """A weight update that did not happen; no worker serves a mixture. Names worker, phase, version and reason."""


def loads(raw: bytes | bytearray | str, limit: int = MAX_CONTROL_BYTES) -> dict[str, Any]:
    """Parse one JSON object strictly: Refused 413 over `limit` bytes; 422 on duplicate keys, NaN, or no object."""
    if len(raw) > limit:
        raise Refused(413, f"the body has more than {limit} bytes")
    if not raw:
        return {}
    try:
        text = raw if isinstance(raw, str) else raw.decode()  # else json guesses UTF-16 and others
        if text.count("[") + text.count("{") > MAX_CONTAINERS:  # some may be of strings
            raise ValueError(f"more than {MAX_CONTAINERS} lists and objects")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(422, f"the body is not strict JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refused(422, f"the body must be a JSON object, not {type(value).__name__}")
    return value


def readable(fileno: int) -> bool:
    """Whether a socket, or its end, can be read without waiting; any number of descriptors will do, unlike `select`."""
    waiting = select.poll()
    waiting.register(fileno, select.POLLIN)
    return bool(waiting.poll(0))


def only(body: dict[str, Any], known: dict[str, Callable[[Any], bool]], where: str = "body") -> None:
    """Refused 422, naming the field, unless every key of `body` is in `known` and its value passes that check."""
    for key, value in body.items():
        if key not in known:
            raise Refused(422, f"{where}.{key[:80]} is not known; known: {', '.join(sorted(known))}")
        if not known[key](value):
            raise Refused(422, f"{where}.{key} has a value that is not allowed: {shown(value)}")


def is_int(value: Any) -> bool:
    """Whether `value` is an integer from 0 to MAX_INT (and no bool)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT


def is_bool(value: Any) -> bool:
    """Whether `value` is true or false."""
    return isinstance(value, bool)


def is_str(value: Any) -> bool:
    """Whether `value` is a string of at most 4096 characters."""
    return isinstance(value, str) and len(value) <= 4096


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("duplicate keys")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
