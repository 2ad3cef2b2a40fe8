"""What GET /openapi.json answers: the routes of a worker, as OpenAPI 3.1.

A description only, of what schemas.py describes. Query parameters are the exception: app.py takes those that are listed
here and no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transfer.agreement import wire
from transfer.worker.schemas import (
    ANY,
    BOOL,
    BOOT,
    COMPLETIONS,
    EPOCH,
    ERROR,
    INT,
    IS_SLEEPING,
    NOTHING,
    ONE_SHOT,
    SAMPLES,
    SESSION_INIT,
    STANDING,
    STATUS,
    STRING,
    TEXT,
    VERSION,
    Schema,
    list_of,
    one_of,
    or_null,
    record,
)

OPENAPI = ("GET", "/openapi.json")


@dataclass(frozen=True, slots=True)
class Operation:
    """One verb: what it does, takes and answers, and with which statuses it may refuse, besides what all have."""

    summary: str
    answer: Schema
    body: Schema = field(default_factory=lambda: NOTHING)
    query: Mapping[str, Schema] = field(default_factory=dict)
    refusals: tuple[int, ...] = ()
    bytes_type: str | None = None  # content type of an answer that a message may ask for in place of JSON


_UPDATE = (409, 503)
_ADDRESSED = (*_UPDATE, 412)

OPERATIONS: dict[str, Operation] = {
    "health": Operation("Whether the process answers; the only route without a token", record({"status": STRING})),
    "completions": Operation("Sample completions of token ids", SAMPLES, COMPLETIONS, {}, (503,), wire.COLUMNS_TYPE),
    "get_world_size": Operation(
        "How many processes hold the model", record({"world_size": INT}), query={"include_dp": BOOL}
    ),
    "init_weight_transfer_engine": Operation(
        "Agree with a trainer on the weights; without an epoch, vLLM's form: nothing to agree on",
        {"anyOf": [STANDING, STATUS]},
        record({"init_info": {"anyOf": [SESSION_INIT, record({}, {"packed": {"const": False}})]}}, BOOT),
        refusals=_ADDRESSED,
    ),
    "start_weight_update": Operation(
        "Begin an update; without an epoch, vLLM's form: to the next version",
        STANDING,
        {
            "anyOf": [
                record({"epoch": EPOCH, "version": INT}, {"digest": TEXT, **BOOT, "where": ANY, "finish": BOOL})
                | {"dependentRequired": {"finish": ["where"]}},
                record({}, {"is_checkpoint_format": {"const": True}}),
            ]
        },
        refusals=_ADDRESSED,
    ),
    "update_weights": Operation(
        "Stage weights; without an epoch, vLLM's form: handles of tensors, one message or several",
        STANDING,
        record({"update_info": {"anyOf": [record({"epoch": EPOCH, "version": INT, "where": ANY}), ONE_SHOT]}}),
        refusals=_UPDATE,
    ),
    "finish_weight_update": Operation(
        "Make the staged version the live one; without an epoch, vLLM's form",
        STANDING,
        {"anyOf": [record({"epoch": EPOCH, "weight_version": VERSION}), record({}, {"weight_version": VERSION})]},
        refusals=_UPDATE,
    ),
    "abort_weight_update": Operation(
        "Drop what is staged", STANDING, record({"epoch": INT, "version": INT}), refusals=_UPDATE
    ),
    "withdraw_weights": Operation(
        "Serve nothing until a newer version is finished: the memory of this one and older ones is about to change",
        STANDING,
        record({"epoch": EPOCH, "version": INT}),
        refusals=_UPDATE,
    ),
    "weight_info": Operation("The live version", record({"weight_version": or_null(STRING)})),
    "status": Operation("Where the worker stands", STATUS),
    "pause": Operation(
        "Let no new completion start",
        record({"status": {"const": "paused"}}),
        record({}, {"mode": one_of(["abort", "wait", "keep"]), "clear_cache": BOOL}),
        {"mode": one_of(["abort", "wait", "keep"]), "clear_cache": BOOL},
        refusals=(503,),
    ),
    "resume": Operation("Let completions start again", record({"status": {"const": "resumed"}}), refusals=(409,)),
    "is_paused": Operation("Whether completions are refused", record({"is_paused": BOOL})),
    "sleep": Operation(
        "Give cached memory back, and serve nothing until wake_up",
        IS_SLEEPING,
        record({}, {"level": one_of([1, "1"])}),
        {"level": one_of([1])},
        refusals=(503,),
    ),
    "wake_up": Operation(
        "Serve again", IS_SLEEPING, record({}, {"tags": {"anyOf": [TEXT, list_of(TEXT)]}}), {"tags": list_of(TEXT, 1)}
    ),
    "is_sleeping": Operation("Whether the worker is asleep", IS_SLEEPING),
    "start_profile": Operation(
        "Trace this process, for some seconds at most",
        record({"is_profiling": {"const": True}}),
        record({}, {"step": INT | {"description": "of the trainer, for the file's name"}}),
        refusals=(409,),
    ),
    "stop_profile": Operation(
        "End the trace and write its file",
        record({"is_profiling": {"const": False}, "said": STRING | {"description": "what is missing of it, if any"}}),
        refusals=(409,),
    ),
    "version": Operation("What answers, and its version", record({"version": STRING})),
}

REASONS = {
    400: "the bytes are not HTTP/1.1, or the address and headers have more than 64 KiB",
    401: "no bearer token, or a wrong one",
    409: "conflict with the worker's state",
    412: "meant for another start of the worker",
    411: "a body without a Content-Length",
    413: "the body is too large",
    422: "the message is not of this form, or names what cannot be; the field is named",
    503: "nothing to serve, or busy with another message until its deadline",
}


def document(verbs: Iterable[str]) -> dict[str, Any]:
    """The OpenAPI document of a worker that has these verbs of wire.ROUTES."""
    paths = {}
    for verb in verbs:
        method, path = wire.ROUTES[verb]
        paths[path] = {method.lower(): _operation(verb, method, OPERATIONS[verb])}
    method, path = OPENAPI
    paths[path] = {method.lower(): _operation("openapi", method, Operation("This document", ANY))}
    return {
        "openapi": "3.1.0",
        "info": {"title": "rollout worker", "version": "1"},
        "paths": paths,
        "security": [{"token": []}],
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": ERROR},
        },
    }


def _operation(verb: str, method: str, told: Operation) -> dict[str, Any]:
    statuses = {422, *told.refusals} | ({411, 413} if method == "POST" else set())
    operation: dict[str, Any] = {
        "operationId": verb,
        "summary": told.summary,
        "parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in told.query.items()],
        "responses": {"200": _response("the answer", told.answer)},
    }
    if told.bytes_type is not None:
        operation["responses"]["200"]["content"][told.bytes_type] = {"schema": {"type": "string", "format": "binary"}}
    if verb == "health":
        operation["security"] = []
    else:
        statuses |= {401}
    operation["responses"]["400"] = {"description": REASONS[400], "content": {"text/plain": {"schema": STRING}}}
    for status in sorted(statuses):
        operation["responses"][str(status)] = _response(REASONS[status], {"$ref": "#/components/schemas/Error"})
    if method == "POST":
        operation["requestBody"] = {"content": _json(told.body), "required": bool(told.body.get("required"))}
    return operation


def _response(description: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": _json(schema)}


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
