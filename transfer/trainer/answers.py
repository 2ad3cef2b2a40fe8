"""What a worker may answer, checked by the senders before anything of it is used; standard library only."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from transfer.agreement import wire
from transfer.agreement.shown import shown
from transfer.engine.inert_pickle import DTYPE_BYTES

MAX_NUMBER = 10**18 - 1  # of a version or an epoch
TOKEN_BYTES = 512  # of an answer, for each token that was asked for; vLLM's JSON has about 150


def is_number(value: Any) -> bool:
    """Whether `value` is a version or an epoch that a worker can have come to."""
    return wire.is_int(value) and value <= MAX_NUMBER


def _is_number_or_none(value: Any) -> bool:
    return value is None or is_number(value)


STATUS = ("epoch", "trainer", "version", "newest")  # what every worker's status has, and a session goes by
KNOWN: dict[str, Callable[[Any], bool]] = {  # wherever a worker tells it
    "epoch": is_number,
    "trainer": wire.is_str,
    "version": _is_number_or_none,
    "newest": _is_number_or_none,
    "boot": wire.is_str,
    "phase": wire.is_str,
    "target": _is_number_or_none,
    "digest": lambda value: value is None or wire.is_str(value),
    "dtype": lambda value: value is None or (isinstance(value, str) and value in DTYPE_BYTES),
}


def checked(worker: str, verb: str, answer: Any) -> dict[str, Any]:
    """The answer to a verb; RemoteError, which names worker and field, if it is none."""
    if not isinstance(answer, dict):
        raise _nonsense(worker, verb, f"it is no JSON object: {shown(answer)}")
    for field, value in answer.items():
        if field in KNOWN and not KNOWN[field](value):
            raise _nonsense(worker, verb, f"{field} cannot be {shown(value)}")
    return answer


def complete(worker: str, verb: str, answer: Any) -> dict[str, Any]:
    """The answer, `checked`, with all that a session goes by."""
    answer = checked(worker, verb, answer)
    for field in STATUS if verb == "status" else ():
        if field not in answer:
            raise _nonsense(worker, verb, f"{field} is missing")
    return answer


def parsed(worker: str, verb: str, raw: bytes) -> dict[str, Any]:
    """The JSON object of an answer; {} for an empty one and for other JSON, with which a stock server confirms."""
    try:
        value = json.loads(raw.decode(), parse_constant=_no_constant) if raw else {}
    except (ValueError, RecursionError):
        raise wire.RemoteError(worker, verb, 0, f"the answer is not JSON: {shown(raw, 200)}") from None
    return value if isinstance(value, dict) else {}


def words(raw: bytes, fallback: str) -> str:
    """A server's own words: {"detail": ...}, {"error": ...}, {"error": {"message": ...}}, or plain text."""
    text = raw.decode(errors="replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text.strip() or fallback
    while isinstance(value, dict):
        value = value.get("detail") or value.get("error") or value.get("message") or text
    return value if isinstance(value, str) else shown(value, wire.MAX_REASON)


def most_bytes(body: Mapping[str, Any]) -> int:
    """How long the answer to this message may be: by the samples that it asks for, if any."""
    prompts, n, tokens = body.get("prompt"), body.get("n", 1), body.get("max_tokens", 0)
    asked = len(prompts) * n * tokens if isinstance(prompts, list) and wire.is_int(n) and wire.is_int(tokens) else 0
    return wire.MAX_CONTROL_BYTES + TOKEN_BYTES * asked


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _nonsense(worker: str, verb: str, why: str) -> wire.RemoteError:
    return wire.RemoteError(worker, verb, 0, f"the answer makes no sense: {why}")
