"""A worker behind HTTP: one route per verb of wire.ROUTES that it has, GET /openapi.json, and nothing else.

Every request but GET /health needs `Authorization: Bearer <token>`; that comes first, also on paths that do not exist.
A verb's message is the JSON object of a POST's body together with the query's parameters (those of openapi.py). Verbs
run in threads: completions, the messages of an update, verbs that wait for nobody and all others each in their own. So
/health, /status and an update get through however many completions run and messages to pause wait. Errors are
`{"error": {"message": ..., "code": <status>}}`. What a verb answers is sent as JSON, bytes as they are: of type
wire.Binary under their own content type.

The verbs are plain ASGI apps behind Starlette's routes: what it puts around a function costs as much again. `AtOnce`
answers, without app and threads, the messages of an update that the worker calls prompt (bounded_http.py).
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from transfer.agreement import wire
from transfer.agreement.wire import Refused
from transfer.worker.bearer import Bearer
from transfer.worker.openapi import OPENAPI, OPERATIONS, document

MAX_COMPLETIONS_BYTES = 64 * 2**20  # a batch of long prompts; control messages have wire.MAX_CONTROL_BYTES
MAX_DEPTH = 32  # lists and objects inside each other: nothing that walks a message may run out of stack
THREADS = 64  # for completions, for the messages of an update, and for verbs that may have to wait for either
QUICK = ("health", "status", "weight_info", "version", "get_world_size", "is_paused", "is_sleeping", "resume")
QUICK_THREADS = 4  # for those, which wait for nobody
FLIPS = ("start_weight_update", "finish_weight_update", "abort_weight_update", "withdraw_weights")
UPDATES = ("init_weight_transfer_engine", "update_weights", *FLIPS)
AT_ONCE = (*FLIPS, "status")
CLOSE = (b"connection", b"close")  # nothing more of this client's is read, not even into a buffer


def make_app(worker: Any, token: str) -> Starlette:
    """The worker's HTTP surface; with an empty token whoever reaches the port may call."""
    verbs = [verb for verb in wire.ROUTES if hasattr(worker, verb)]
    quick, updates = ThreadPoolExecutor(QUICK_THREADS, "quick"), ThreadPoolExecutor(THREADS, "updates")
    sampling, others = ThreadPoolExecutor(THREADS, "completions"), ThreadPoolExecutor(THREADS, "verbs")
    pools = {"completions": sampling} | dict.fromkeys(QUICK, quick) | dict.fromkeys(UPDATES, updates)
    routes = [_route(*wire.ROUTES[verb], Verb(verb, getattr(worker, verb), pools.get(verb, others))) for verb in verbs]
    described = cache(lambda: document(verbs))
    routes.append(_route(*OPENAPI, Verb("openapi", lambda message: described(), quick)))
    guard = [Middleware(BearerToken, token=token)] if token else []
    app = Starlette(routes=routes, middleware=guard, exception_handlers={HTTPException: _http_error})
    app.router.redirect_slashes = False
    return app


class AtOnce:
    """Messages of an update that are answered in the thread of the event loop, because they take no longer than that.

    For workers that say which: `prompt(verb)`, whether it would be done without waiting for anybody.
    """

    def __init__(self, worker: Any, token: str) -> None:
        self._prompt: Callable[[str], bool] = getattr(worker, "prompt", lambda verb: False)
        self._bearer = Bearer(token)
        self._verbs = {
            (method.encode(), path.encode()): (verb, partial(answer, getattr(worker, verb), wire.MAX_CONTROL_BYTES, {}))
            for verb in AT_ONCE
            for method, path in [wire.ROUTES[verb]]
            if hasattr(worker, verb)
        }

    def admits(self, method: bytes, path: bytes, authorization: list[bytes], nbytes: int) -> bool:
        """Whether a request with these headers may be answered here."""
        few = nbytes <= (wire.MAX_CONTROL_BYTES if method == b"POST" else 0)
        return few and (method, path) in self._verbs and self._bearer.allows(authorization)

    def answer(self, method: bytes, path: bytes, body: bytearray) -> tuple[int, bytes] | None:
        """The status and the body, or None if somebody would have to wait."""
        verb, call = self._verbs[method, path]
        return call(body, b"") if self._prompt(verb) else None


class BearerToken:
    """Answers 401, before anything is read, to every request without the token but the health probe."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._bearer = Bearer(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "lifespan" or self._allows(scope):
            await self._app(scope, receive, send)
        else:
            reason = "this route needs the run's bearer token in the Authorization header"
            await _send(send, 401, _error(401, reason), [(b"www-authenticate", b"Bearer"), CLOSE])

    def _allows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return self._bearer.allows(given) or (scope["method"], scope["path"]) == wire.ROUTES["health"]


class Verb:
    """One method of the worker as an ASGI app."""

    def __init__(self, verb: str, call: Callable[[dict[str, Any]], Any], pool: ThreadPoolExecutor) -> None:
        query = OPERATIONS[verb].query if verb in OPERATIONS else {}
        self._limit = MAX_COMPLETIONS_BYTES if verb == "completions" else wire.MAX_CONTROL_BYTES
        self._answer = partial(answer, call, self._limit, query)
        self._pool = pool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if any(name == b"transfer-encoding" for name, _ in scope["headers"]):
            await _send(send, 411, _error(411, "send the body with a Content-Length, not in chunks"), [CLOSE])
            return
        body = await read_body(receive, self._limit) if scope["method"] == "POST" else bytearray()
        if body is not None:
            loop = asyncio.get_running_loop()
            status, said = await loop.run_in_executor(self._pool, self._answer, body, scope["query_string"])
            await _send(send, status, said)


def answer(
    call: Callable[[dict[str, Any]], Any], limit: int, known: Mapping[str, Any], body: bytearray, query: bytes
) -> tuple[int, bytes]:
    """The status and the JSON, or bytes, of a worker's answer to a body of at most `limit` bytes; never raises."""
    try:
        message = shallow(wire.loads(body, limit))  # 413 if over the limit
        if query:
            _add_query(message, query, known)
        return 200, _encoded(call(message))
    except Refused as refusal:
        return refusal.status, _error(refusal.status, refusal.reason)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return 500, _error(500, f"{type(error).__name__}: {error}".splitlines()[0])


async def read_body(receive: Receive, limit: int) -> bytearray | None:
    """The body, read no further than one chunk beyond the limit; None if the client is gone."""
    body = bytearray()
    more = True
    while more and len(body) <= limit:
        event = await receive()
        if event["type"] == "http.disconnect":
            return None
        body += event.get("body", b"")
        more = event.get("more_body", False)
    return body


def shallow(message: dict[str, Any]) -> dict[str, Any]:
    """The message; Refused 422 if it is nested too deeply."""
    level: list[Any] = [message]
    for _ in range(MAX_DEPTH):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [value for values in inner for value in values if isinstance(value, list | dict)]
        if not level:
            return message
    raise Refused(422, f"the body has more than {MAX_DEPTH} lists and objects inside each other")


def _add_query(message: dict[str, Any], query: bytes, known: Mapping[str, Any]) -> None:
    """Put the query's parameters into the message, as vLLM's /pause?mode=abort&clear_cache=true has them."""
    given: dict[str, list[Any]] = {}
    for key, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if key not in known:
            raise Refused(422, f"query.{key[:80]} is not known; known: {', '.join(sorted(known)) or 'none'}")
        if known[key].get("type") == "boolean":
            given.setdefault(key, []).append({"true": True, "false": False}.get(value.lower(), value))
        else:
            given.setdefault(key, []).append(value)
    if twice := sorted(message.keys() & given.keys()):
        raise Refused(422, f"{twice[0]} is given twice")
    message |= {key: values[0] if len(values) == 1 else values for key, values in given.items()}


def _encoded(answer: Any) -> bytes:
    if isinstance(answer, wire.Binary):
        return answer
    return json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()


def _error(status: int, reason: str) -> bytes:
    return _encoded({"error": {"message": reason[: wire.MAX_REASON], "code": status}})


async def _send(send: Send, status: int, answer: bytes, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
    kind = answer.content_type if isinstance(answer, wire.Binary) else "application/json"
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(answer)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def _route(method: str, path: str, endpoint: Verb) -> Route:
    route = Route(path, endpoint, methods=[method])
    route.methods = {method}  # without the HEAD that Starlette adds to a GET
    return route


async def _http_error(_: Any, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = _error(error.status_code, error.detail)
    return Response(answer, error.status_code, error.headers, media_type="application/json")
