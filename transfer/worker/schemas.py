"""What a worker's messages and answers look like, as JSON schemas.

Descriptions only: bodies.py decides what is taken of an update, whoever samples what is taken of completions. The tests
hold the two against each other, field by field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transfer.agreement import wire
from transfer.agreement.manifest import DTYPES
from transfer.agreement.manifest import MAX_BYTES as MAX_TENSOR_BYTES
from transfer.agreement.protocol import Phase
from transfer.config import InFlight, Verify

Schema = dict[str, Any]


def record(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """An object with these fields and no others."""
    named = {**required, **(optional or {})}
    return {"type": "object", "properties": named, "required": [*required], "additionalProperties": False}


def list_of(items: Schema, least: int = 0, **more: Any) -> Schema:
    """A list of at least `least` of these."""
    return {"type": "array", "items": items, "minItems": least, **more}


def integer(minimum: int = 0, maximum: int = wire.MAX_INT) -> Schema:
    """An integer within these bounds."""
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


def one_of(values: Iterable[Any]) -> Schema:
    """One of these values."""
    return {"enum": list(values)}


def or_null(schema: Schema) -> Schema:
    """That, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


INT, EPOCH = integer(), integer(1)
STRING, TEXT = {"type": "string"}, {"type": "string", "maxLength": 4096}
NUMBER, BOOL, ANY = {"type": "number"}, {"type": "boolean"}, {"type": "object"}
VERSION = {"type": "string", "pattern": "^[0-9]{1,18}$", "description": "a version's number, in digits"}
NOTHING = record({})


# --- messages ---------------------------------------------------------------------------------------------------------

MAX_ROWS = 65536  # prompts * n of one completion

_ROW = {
    "type": "array",
    "prefixItems": [STRING, one_of(DTYPES), list_of(integer(0, MAX_TENSOR_BYTES)), list_of(STRING)],
    "items": False,
    "minItems": 4,
    "description": "name, dtype, shape and aliases",
}
_MANIFEST = record({"entries": list_of(_ROW)}) | {"description": "ordered by name, and equal to the worker's own"}
SESSION_INIT = record(
    {
        "epoch": EPOCH,
        "trainer": TEXT | {"description": "this trainer's own name for itself: who comes with the same epoch again"},
        "manifest": _MANIFEST,
        "timeout_s": {"type": "number", "exclusiveMinimum": 0, "maximum": 3600},
        "where": ANY | {"description": "what the backend must know to find the trainer's memory"},
    },
    {"verify": one_of(v.value for v in Verify), "in_flight": one_of(f.value for f in InFlight)},
)
ONE_SHOT = record(
    {
        "names": list_of(STRING),
        "dtype_names": list_of(STRING),
        "shapes": list_of(list_of(integer(0, MAX_TENSOR_BYTES))),
    },
    {
        "ipc_handles": list_of(ANY | {"description": "{GPU UUID: fields}"}),
        "ipc_handles_pickled": STRING | {"description": "base64 of a pickle of the list; read without running it"},
    },
) | {"oneOf": [{"required": ["ipc_handles"]}, {"required": ["ipc_handles_pickled"]}]}
_TOKEN = integer() | {"description": "a token id below the size of the model's vocabulary"}
_PROMPT = list_of(_TOKEN, 1)
COMPLETIONS = record(
    {"prompt": {"anyOf": [_PROMPT, list_of(_PROMPT, 1, maxItems=MAX_ROWS)]}},
    {
        "model": TEXT,
        "n": integer(1, MAX_ROWS) | {"description": f"samples a prompt; at most {MAX_ROWS} in all"},
        "max_tokens": integer(1, 2**20) | {"description": "and no more than the model's positions have room for"},
        "temperature": {"anyOf": [{"const": 0}, {"type": "number", "minimum": 0.001, "maximum": 1000}]},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "top_k": INT | {"description": "0: all tokens"},
        "min_p": {"type": "number", "minimum": 0, "maximum": 1},
        "seed": INT,
        "seeds": list_of(INT, 1, maxItems=MAX_ROWS) | {"description": "one for each prompt"},
        "firsts": list_of(integer(0, MAX_ROWS - 1), 1, maxItems=MAX_ROWS)
        | {"description": "of each prompt, the number of its first sample; not given: 0"},
        "stop_token_ids": list_of(_TOKEN),
        "logprobs": or_null(integer(0, 1)),
        "logprobs_rows": list_of(integer(0, MAX_ROWS - 1))
        | {"description": "the choices that are to have log-probs; not given: all, if logprobs is"},
        "return_token_ids": {"const": True},
        "encoding": one_of(["json", "columns"])
        | {"description": f"columns: the answer is bytes, of content type {wire.COLUMNS_TYPE}"},
    },
) | {
    "not": {"required": ["seed", "seeds"]},
    "dependentSchemas": {"logprobs_rows": {"properties": {"logprobs": INT}, "required": ["logprobs"]}},
}


# --- answers ----------------------------------------------------------------------------------------------------------

_PHASE = one_of(phase.value for phase in Phase)
STANDING = record({"phase": _PHASE})
BOOT = {"boot": TEXT | {"description": "the start of the worker that this is meant for, from status"}}
STATUS = record(
    {
        "phase": _PHASE,
        "boot": STRING | {"description": "one start of this worker"},
        "epoch": INT,
        "trainer": TEXT | {"description": "who has taken that epoch"},
        "version": or_null(INT) | {"description": "what completions are sampled with"},
        "newest": or_null(INT) | {"description": "the newest finished version"},
        "target": or_null(INT) | {"description": "the version that is being staged"},
        "digest": or_null(TEXT),
        "manifest": STRING,
        "dtype": or_null(STRING),
        "serving": INT | {"description": "completions that run now"},
        "plan": STRING | {"description": "how an update's bytes get here, in words"},
    },
    {"gpu_memory_mib": NUMBER | {"description": "of a GPU, what the worker's process has taken at most"}},
)
_CHOICE = record(
    {
        "index": INT,
        "text": {"const": ""},
        "token_ids": list_of(INT),
        "logprobs": or_null(record({"token_logprobs": list_of(NUMBER)})),
        "finish_reason": one_of(["stop", "length", "abort"]),
        "weight_version": or_null(INT),
        "weight_versions": list_of(list_of(INT, 2, maxItems=2)),
    }
)
SAMPLES = record(
    {"choices": list_of(_CHOICE), "usage": record({"prompt_tokens": INT, "completion_tokens": INT})},
)
ERROR = record({"error": record({"message": STRING, "code": integer(400, 599)})})
IS_SLEEPING = record({"is_sleeping": BOOL})
