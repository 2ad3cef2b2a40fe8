"""What GET /openapi.json answers: the routes of a worker, as OpenAPI 3.1.

A description only: what a worker takes of an update is decided in bodies.py, and the sampling verbs belong to
whoever samples, and the tests hold the two against each other, field by field. Query parameters are the exception:
app.py takes those that are listed here and no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transfer.agreement import wire
from transfer.agreement.manifest import DTYPES
from transfer.agreement.manifest import MAX_BYTES as MAX_TENSOR_BYTES
from transfer.agreement.protocol import Phase
from transfer.config import InFlight, Verify

OPENAPI = ("GET", "/openapi.json")

Schema = dict[str, Any]


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    named = {**required, **(optional or {})}
    return {"type": "object", "properties": named, "required": [*required], "additionalProperties": False}


def _list(items: Schema, least: int = 0, **more: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": least, **more}


def _int(minimum: int = 0, maximum: int = wire.MAX_INT) -> Schema:
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


def _one_of(values: Iterable[Any]) -> Schema:
    return {"enum": list(values)}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


INT, EPOCH = _int(), _int(1)
STRING, TEXT = {"type": "string"}, {"type": "string", "maxLength": 4096}
NUMBER, BOOL, ANY = {"type": "number"}, {"type": "boolean"}, {"type": "object"}
VERSION = {"type": "string", "pattern": "^[0-9]{1,18}$", "description": "a version's number, in digits"}
NOTHING = _object({})


# --- messages ---------------------------------------------------------------------------------------------------------

MAX_ROWS = 65536  # prompts * n of one completion

_ROW = {
    "type": "array",
    "prefixItems": [STRING, _one_of(DTYPES), _list(_int(0, MAX_TENSOR_BYTES)), _list(STRING)],
    "items": False,
    "minItems": 4,
    "description": "name, dtype, shape and aliases",
}
_MANIFEST = _object({"entries": _list(_ROW)}) | {"description": "ordered by name, and equal to the worker's own"}
_SESSION_INIT = _object(
    {
        "epoch": EPOCH,
        "trainer": TEXT | {"description": "this trainer's own name for itself: who comes with the same epoch again"},
        "manifest": _MANIFEST,
        "timeout_s": {"type": "number", "exclusiveMinimum": 0, "maximum": 3600},
        "where": ANY | {"description": "what the backend must know to find the trainer's memory"},
    },
    {"verify": _one_of(v.value for v in Verify), "in_flight": _one_of(f.value for f in InFlight)},
)
_ONE_SHOT = _object(
    {"names": _list(STRING), "dtype_names": _list(STRING), "shapes": _list(_list(_int(0, MAX_TENSOR_BYTES)))},
    {
        "ipc_handles": _list(ANY | {"description": "{GPU UUID: fields}"}),
        "ipc_handles_pickled": STRING | {"description": "base64 of a pickle of the list; read without running it"},
    },
) | {"oneOf": [{"required": ["ipc_handles"]}, {"required": ["ipc_handles_pickled"]}]}
_TOKEN = _int() | {"description": "a token id below the size of the model's vocabulary"}
_PROMPT = _list(_TOKEN, 1)
_COMPLETIONS = _object(
    {"prompt": {"anyOf": [_PROMPT, _list(_PROMPT, 1, maxItems=MAX_ROWS)]}},
    {
        "model": TEXT,
        "n": _int(1, MAX_ROWS) | {"description": f"samples a prompt; at most {MAX_ROWS} in all"},
        "max_tokens": _int(1, 2**20) | {"description": "and no more than the model's positions have room for"},
        "temperature": {"anyOf": [{"const": 0}, {"type": "number", "minimum": 0.001, "maximum": 1000}]},
        "seed": INT,
        "seeds": _list(INT, 1, maxItems=MAX_ROWS) | {"description": "one for each prompt"},
        "stop_token_ids": _list(_TOKEN),
        "logprobs": _or_null(_int(0, 1)),
        "logprobs_rows": _list(_int(0, MAX_ROWS - 1))
        | {"description": "the choices that are to have log-probs; not given: all, if logprobs is"},
        "return_token_ids": {"const": True},
        "encoding": _one_of(["json", "columns"])
        | {"description": f"columns: the answer is bytes, of content type {wire.COLUMNS_TYPE}"},
    },
) | {
    "not": {"required": ["seed", "seeds"]},
    "dependentSchemas": {"logprobs_rows": {"properties": {"logprobs": INT}, "required": ["logprobs"]}},
}


# --- answers ----------------------------------------------------------------------------------------------------------

_PHASE = _one_of(phase.value for phase in Phase)
_STANDING = _object({"phase": _PHASE})
_BOOT = {"boot": TEXT | {"description": "the start of the worker that this is meant for, from status"}}
_STATUS = _object(
    {
        "phase": _PHASE,
        "boot": STRING | {"description": "one start of this worker"},
        "epoch": INT,
        "trainer": TEXT | {"description": "who has taken that epoch"},
        "version": _or_null(INT) | {"description": "what completions are sampled with"},
        "newest": _or_null(INT) | {"description": "the newest finished version"},
        "target": _or_null(INT) | {"description": "the version that is being staged"},
        "digest": _or_null(TEXT),
        "manifest": STRING,
        "dtype": _or_null(STRING),
        "serving": INT | {"description": "completions that run now"},
        "plan": STRING | {"description": "how an update's bytes get here, in words"},
    },
    {"gpu_memory_mib": NUMBER | {"description": "of a GPU, what the worker's process has taken at most"}},
)
_CHOICE = _object(
    {
        "index": INT,
        "text": {"const": ""},
        "token_ids": _list(INT),
        "logprobs": _or_null(_object({"token_logprobs": _list(NUMBER)})),
        "finish_reason": _one_of(["stop", "length", "abort"]),
        "weight_version": _or_null(INT),
        "weight_versions": _list(_list(INT, 2, maxItems=2)),
    }
)
_SAMPLES = _object(
    {"choices": _list(_CHOICE), "usage": _object({"prompt_tokens": INT, "completion_tokens": INT})},
)
_ERROR = _object({"error": _object({"message": STRING, "code": _int(400, 599)})})
_IS_SLEEPING = _object({"is_sleeping": BOOL})


# --- routes -----------------------------------------------------------------------------------------------------------


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
    "health": Operation("Whether the process answers; the only route without a token", _object({"status": STRING})),
    "completions": Operation("Sample completions of token ids", _SAMPLES, _COMPLETIONS, {}, (503,), wire.COLUMNS_TYPE),
    "get_world_size": Operation(
        "How many processes hold the model", _object({"world_size": INT}), query={"include_dp": BOOL}
    ),
    "init_weight_transfer_engine": Operation(
        "Agree with a trainer on the weights; without an epoch, vLLM's form: nothing to agree on",
        {"anyOf": [_STANDING, _STATUS]},
        _object({"init_info": {"anyOf": [_SESSION_INIT, _object({}, {"packed": {"const": False}})]}}, _BOOT),
        refusals=_ADDRESSED,
    ),
    "start_weight_update": Operation(
        "Begin an update; without an epoch, vLLM's form: to the next version",
        _STANDING,
        {
            "anyOf": [
                _object({"epoch": EPOCH, "version": INT}, {"digest": TEXT, **_BOOT, "where": ANY, "finish": BOOL})
                | {"dependentRequired": {"finish": ["where"]}},
                _object({}, {"is_checkpoint_format": {"const": True}}),
            ]
        },
        refusals=_ADDRESSED,
    ),
    "update_weights": Operation(
        "Stage weights; without an epoch, vLLM's form: handles of tensors, one message or several",
        _STANDING,
        _object({"update_info": {"anyOf": [_object({"epoch": EPOCH, "version": INT, "where": ANY}), _ONE_SHOT]}}),
        refusals=_UPDATE,
    ),
    "finish_weight_update": Operation(
        "Make the staged version the live one; without an epoch, vLLM's form",
        _STANDING,
        {"anyOf": [_object({"epoch": EPOCH, "weight_version": VERSION}), _object({}, {"weight_version": VERSION})]},
        refusals=_UPDATE,
    ),
    "abort_weight_update": Operation(
        "Drop what is staged", _STANDING, _object({"epoch": INT, "version": INT}), refusals=_UPDATE
    ),
    "withdraw_weights": Operation(
        "Serve nothing until a newer version is finished: the memory of this one and older ones is about to change",
        _STANDING,
        _object({"epoch": EPOCH, "version": INT}),
        refusals=_UPDATE,
    ),
    "weight_info": Operation("The live version", _object({"weight_version": _or_null(STRING)})),
    "status": Operation("Where the worker stands", _STATUS),
    "pause": Operation(
        "Let no new completion start",
        _object({"status": {"const": "paused"}}),
        _object({}, {"mode": _one_of(["abort", "wait", "keep"]), "clear_cache": BOOL}),
        {"mode": _one_of(["abort", "wait", "keep"]), "clear_cache": BOOL},
        refusals=(503,),
    ),
    "resume": Operation("Let completions start again", _object({"status": {"const": "resumed"}}), refusals=(409,)),
    "is_paused": Operation("Whether completions are refused", _object({"is_paused": BOOL})),
    "sleep": Operation(
        "Give cached memory back, and serve nothing until wake_up",
        _IS_SLEEPING,
        _object({}, {"level": _one_of([1, "1"])}),
        {"level": _one_of([1])},
        refusals=(503,),
    ),
    "wake_up": Operation(
        "Serve again", _IS_SLEEPING, _object({}, {"tags": {"anyOf": [TEXT, _list(TEXT)]}}), {"tags": _list(TEXT, 1)}
    ),
    "is_sleeping": Operation("Whether the worker is asleep", _IS_SLEEPING),
    "start_profile": Operation(
        "Trace this process, for some seconds at most",
        _object({"is_profiling": {"const": True}}),
        _object({}, {"step": INT | {"description": "of the trainer, for the file's name"}}),
        refusals=(409,),
    ),
    "stop_profile": Operation(
        "End the trace and write its file",
        _object({"is_profiling": {"const": False}, "said": STRING | {"description": "what is missing of it, if any"}}),
        refusals=(409,),
    ),
    "version": Operation("What answers, and its version", _object({"version": STRING})),
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
            "schemas": {"Error": _ERROR},
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
