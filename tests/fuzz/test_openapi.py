"""The OpenAPI document is true: it knows what the checks know, and promises every answer that schemathesis gets."""

import asyncio
import collections
import copy
import json
import re

import jsonschema_rs
import pytest
import requests
import schemathesis
from attack import Client, running, trainer_can_go_on
from mutations import VALUES
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from traffic import Traffic

from rlhf.rollout import completions
from rlhf.rollout.worker import Worker
from transfer.agreement import wire
from transfer.backends.local import LocalPublisher
from transfer.worker import app, bodies, openapi, schemas

PROMPT = [[3, 4], [5]]


@pytest.fixture(scope="module")
def worker():
    """A worker around a tiny model, without weights."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 12}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return Worker.around(AutoModelForCausalLM.from_config(Qwen3Config(**sizes, **heads)), LocalPublisher().endpoint)


SESSION = {"epoch": 1, "version": 0}
INIT = {
    "epoch": 1,
    "trainer": "t",
    "manifest": {"entries": []},
    "timeout_s": 5.0,
    "where": {},
    "verify": "off",
    "in_flight": "wait",
}
ONE_SHOT = {"names": [], "dtype_names": [], "shapes": [], "ipc_handles": []}
CUT = {"top_p": 0.9, "top_k": 3, "min_p": 0.1}
SAMPLING = {"model": "m", "n": 1, "max_tokens": 2, "temperature": 0.5, "stop_token_ids": [1], "logprobs": 0, **CUT}
ENCODED = {"encoding": "json", "logprobs": 0, "logprobs_rows": [0]}
FORMS = [  # every form of every message: verb, message, and where its fields are
    ("init_weight_transfer_engine", {"init_info": INIT}, "init_info"),
    ("init_weight_transfer_engine", {"init_info": {"packed": False}}, "init_info"),
    ("start_weight_update", {**SESSION, "digest": "d"}, None),
    ("start_weight_update", {**SESSION, "where": {}, "finish": True}, None),
    ("start_weight_update", {"is_checkpoint_format": True}, None),
    ("update_weights", {"update_info": {**SESSION, "where": {}}}, "update_info"),
    ("update_weights", {"update_info": ONE_SHOT}, "update_info"),
    ("finish_weight_update", {"epoch": 1, "weight_version": "0"}, None),
    ("finish_weight_update", {"weight_version": "0"}, None),
    ("abort_weight_update", SESSION, None),
    ("withdraw_weights", SESSION, None),
    ("completions", {"prompt": PROMPT, **SAMPLING, "seeds": [1, 2], "return_token_ids": True}, None),
    ("completions", {"prompt": PROMPT, "seed": 3}, None),
    ("completions", {"prompt": PROMPT, **ENCODED}, None),
    ("pause", {"mode": "keep", "clear_cache": True}, None),
    ("sleep", {"level": 1}, None),
    ("wake_up", {"tags": ["weights"]}, None),
    ("resume", {}, None),
    ("start_profile", {"step": 3}, None),
]
IDS = [f"{verb}{'/'.join(message.get(inner, message))[:20]}" for verb, message, inner in FORMS]


def body_schema(verb):
    return openapi.OPERATIONS[verb].body


def fields_described(verb, message, inner):
    """The fields of the one alternative of the schema that has those of the message."""
    schema = body_schema(verb)["properties"][inner] if inner else body_schema(verb)
    found = [set(each["properties"]) for each in schema.get("anyOf", [schema])]
    given = set(message[inner] if inner else message)
    (fields,) = [fields for fields in found if given <= fields and ("epoch" in given) == ("epoch" in fields)]
    return fields


def asked(worker, verb, message, inner=None, **changes):
    """None if the worker takes the message's form, else its words."""
    message = copy.deepcopy(message)
    (message[inner] if inner else message).update(changes)
    try:
        getattr(worker, verb)(message)
    except wire.Refused as refusal:
        return refusal.reason if refusal.status == 422 else None
    return None


def test_every_verb_is_described_and_every_route_is_a_verb_or_the_document(worker):
    assert list(openapi.OPERATIONS) == list(wire.ROUTES)
    paths = openapi.document(wire.ROUTES)["paths"]
    served = {(method, route.path) for route in app.make_app(worker, "t").routes for method in route.methods}
    assert {(method.upper(), path) for path, told in paths.items() for method in told} == served
    assert len(served) == len(wire.ROUTES) + 1


def test_a_worker_without_a_verb_does_not_describe_it():
    assert set(openapi.document(["health", "pause"])["paths"]) == {"/health", "/pause", "/openapi.json"}


@pytest.mark.parametrize(("verb", "message", "inner"), FORMS, ids=IDS)
def test_the_document_and_the_checks_know_the_same_fields(verb, message, inner, worker):
    reason = asked(worker, verb, message, inner, **{"?": 1})
    known = re.search(r"(?:known|keys): (.*)", reason).group(1)
    assert fields_described(verb, message, inner) == {name for name in known.split(", ") if name}
    assert jsonschema_rs.is_valid(body_schema(verb), message)
    assert not jsonschema_rs.is_valid(body_schema(verb), {**message, "?": 1})


def test_the_tables_of_fields_that_the_checks_have_are_the_documents():
    assert fields_described(*FORMS[0]) == set(bodies.INIT_INFO.fields)
    assert set(body_schema("completions")["properties"]) == set(completions.KNOWN)


@pytest.mark.parametrize("verb", ["get_world_size", "pause", "sleep", "wake_up"])
def test_query_parameters_are_fields_that_the_verb_knows(verb, worker):
    known = re.search(r"known: (.*)", asked(worker, verb, {}, **{"?": 1})).group(1)
    assert set(openapi.OPERATIONS[verb].query) == set(known.split(", "))


def test_no_other_verb_takes_query_parameters():
    taking = [verb for verb, told in openapi.OPERATIONS.items() if told.query]
    assert taking == ["get_world_size", "pause", "sleep", "wake_up"]


WHAT_A_SCHEMA_CANNOT_SAY = {  # fields whose values must fit the model, the trainer, or each other
    *(("completions", field) for field in ("prompt", "seeds", "max_tokens", "logprobs_rows")),
    *(("update_weights", field) for field in (*ONE_SHOT, "where")),
    ("start_weight_update", "where"),
    *(("init_weight_transfer_engine", field) for field in ("manifest", "where")),
}


SINGLE_VALUES = [
    pytest.param(verb, message, inner, field, id=f"{name}-{field}")
    for (verb, message, inner), name in zip(FORMS, IDS, strict=True)
    for field in (message[inner] if inner else message)
    if (verb, field) not in WHAT_A_SCHEMA_CANNOT_SAY
]


@pytest.mark.parametrize(("verb", "message", "inner", "field"), SINGLE_VALUES)
def test_the_document_allows_a_value_if_and_only_if_the_check_does(verb, message, inner, field, worker):
    schema = jsonschema_rs.validator_for(body_schema(verb))
    compared = 0
    for value in VALUES:
        if (isinstance(value, float) and value.is_integer()) or (isinstance(value, int) and abs(value) > 2**65):
            continue  # 1.0 is an integer to JSON Schema, and not to us; the validator reads longer numbers as floats
        changed = copy.deepcopy(message)
        (changed[inner] if inner else changed)[field] = value
        try:
            json.dumps(changed, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            continue  # nor can it read half a surrogate pair
        refused = asked(worker, verb, changed)
        refused = None if refused and not re.search(rf"\b{field}\b(?!')", refused) else refused  # it has another reason
        assert schema.is_valid(changed) == (refused is None), (value, refused)
        compared += 1
    assert compared > 50


def test_the_document_is_made_at_its_first_request_and_then_kept(worker, monkeypatch):
    made = []
    monkeypatch.setattr(app, "document", lambda verbs: made.append(verbs) or {"openapi": "3.1.0"})
    served = app.make_app(worker, "")
    assert made == []
    for _ in range(3):
        assert asyncio.run(get(served, "/openapi.json")) == b'{"openapi":"3.1.0"}'
    assert made == [list(wire.ROUTES)]


async def get(served, path):
    sent = []

    async def send(event):
        sent.append(event)

    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": [], "root_path": ""}
    await served(scope, None, send)
    return sent[1]["body"]


# --- schemathesis -----------------------------------------------------------------------------------------------------


def settings(token):
    accepted = ["2xx", "401", "409", "412", "503"]
    refused = ["400", "401", "405", "409", "411", "412", "413", "422", "503"]
    fitting = {"checks": {"positive_data_acceptance": {"expected-statuses": [*accepted, "422"]}}}
    return SchemathesisConfig.from_dict(
        {
            "seed": 0,
            "headers": {"Authorization": f"Bearer {token}"},
            "cache": {"enabled": False},
            "continue-on-failure": True,
            "generation": {"database": "none", "max-examples": 40, "mode": "all"},
            "phases": {"stateful": {"enabled": False}},
            "checks": {
                "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "503"]},
                "positive_data_acceptance": {"expected-statuses": accepted},
                "negative_data_rejection": {"expected-statuses": refused},
            },
            "operations": [{"include-operation-id": sorted({verb for verb, _ in WHAT_A_SCHEMA_CANNOT_SAY}), **fitting}],
        }
    )


def made_possible(url, headers):
    """A hook that leaves a case as valid or invalid as it was, and spares it what JSON Schema does not know of."""

    def before_call(context, case, **options):
        body, verb = case.body, case.operation.definition.raw["operationId"]
        if case.meta.generation.mode.is_positive and isinstance(body, dict):
            body = case.body = whole({key: value for key, value in body.items() if key not in (case.query or {})})
        if verb == "withdraw_weights" and isinstance(body, dict) and type(body.get("version")) is int:
            body["version"] = min(body["version"], 0)  # long ago: else there would be no completions any more
        if verb == "completions":
            for needed in ("wake_up", "resume"):
                said = requests.post(f"{url}/{needed}", headers=headers, timeout=20)
                assert said.status_code in (200, 409)  # refused where the weights have been withdrawn
            if isinstance(body, dict):
                spare(body)

    return before_call


def spare(body):
    """Ask for fewer samples, where the number of them is allowed."""
    for field, most, few in (("n", schemas.MAX_ROWS, 2), ("max_tokens", 2**20, 4)):
        if type(body.get(field)) is int and 0 < body[field] <= most:
            body[field] = min(body[field], few)
    if isinstance(body.get("prompt"), list) and len(body["prompt"]) <= schemas.MAX_ROWS:
        body["prompt"] = body["prompt"][:3]


def whole(value):
    """1.0 as 1."""
    match value:
        case float() if value.is_integer() and abs(value) < 2**64:
            return int(value)
        case dict():
            return {key: whole(inner) for key, inner in value.items()}
        case list():
            return [whole(inner) for inner in value]
    return value


@pytest.mark.slow
def test_schemathesis_finds_no_answer_that_the_document_does_not_promise():
    seen, failures = collections.Counter(), []
    with running() as target:
        told = target.start("arena view")
        target.do("fuzz", count=300)
        with Client(told["port"], told["token"]) as client:
            assert trainer_can_go_on(target, client, Traffic(0, told["material"]), 0) == []  # it holds weights
        url, config = f"http://127.0.0.1:{told['port']}", settings(told["token"])
        headers = {"Authorization": f"Bearer {told['token']}"}
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers, config=config)
        hook = schemathesis.hook(made_possible(url, headers))
        try:
            for event in from_schema(schema).execute():
                assert not isinstance(event, events.NonFatalError | events.FatalError), event
                if isinstance(event, events.ScenarioFinished):
                    seen.update(statuses(event.recorder))
                    failures += failed(event.recorder)
        finally:
            schemathesis.hooks.unregister(hook)
        after = target.do("look")
    assert failures == [], "\n".join(failures[:10])
    assert after["audit"] == []
    assert {label for label, _, _ in seen} == {f"{method} {path}" for method, path in wire.ROUTES.values()}
    assert seen["POST /v1/completions", "positive", 200] > 5 and sum(seen.values()) > 800


def statuses(recorder):
    for key, exchange in recorder.interactions.items():
        case = recorder.cases[key].value
        yield case.operation.label, case.meta.generation.mode.value, exchange.response.status_code


def failed(recorder):
    for key, checks in recorder.checks.items():
        exchange = recorder.interactions[key]
        for check in checks:
            if check.failure_info is not None:
                said = exchange.response.content[:300] if exchange.response else None
                request = exchange.request
                sent = f"{request.method} {request.uri[:200]} {(request.body or b'')[:300]!r}"
                yield f"{check.name}: {check.failure_info.failure.message}\n    {sent}\n    {said!r}"
