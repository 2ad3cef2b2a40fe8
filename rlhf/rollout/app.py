"""A worker behind HTTP: one route per verb of `transfer.wire.ROUTES`, and nothing else.

Every request but GET /health needs `Authorization: Bearer <token>`; that comes first, also on paths that do not exist.
A verb's message is the JSON object of the body together with the query's parameters. Verbs run in threads, so that
/health and /status answer while the worker samples. Errors are `{"error": {"message": ..., "code": <status>}}`.
"""

from __future__ import annotations

import hmac
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from transfer import wire
from transfer.wire import Refused

if TYPE_CHECKING:
    from rlhf.rollout.worker import Worker

MAX_COMPLETIONS_BYTES = 64 * 2**20  # a batch of long prompts; control messages have wire.MAX_CONTROL_BYTES


def make_app(worker: Worker, token: str) -> FastAPI:
    """The worker's HTTP surface; with an empty token whoever reaches the port may call."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    for verb, (method, path) in wire.ROUTES.items():
        app.add_api_route(path, _endpoint(worker, verb), methods=[method], response_model=None)
    app.add_exception_handler(HTTPException, _http_error)
    if token:
        app.add_middleware(BearerToken, token=token)
    return app


class BearerToken:
    """Answers 401, before anything is read, to every request without the token but the health probe."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allows(scope):
            await self._app(scope, receive, send)
        else:
            response = _error(401, "this route needs the run's bearer token in the Authorization header")
            response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        right = len(given) == 1 and hmac.compare_digest(given[0], self._expected)
        return right or (scope["method"], scope["path"]) == wire.ROUTES["health"]


def _endpoint(worker: Worker, verb: str) -> Callable[[Request], Awaitable[JSONResponse]]:
    call = getattr(worker, verb)
    limit = MAX_COMPLETIONS_BYTES if verb == "completions" else wire.MAX_CONTROL_BYTES

    async def endpoint(request: Request) -> JSONResponse:
        try:
            message = _merged(wire.loads(await _body(request, limit), limit), request)
            return JSONResponse(await run_in_threadpool(call, message))
        except Refused as refusal:
            return _error(refusal.status, refusal.reason)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            return _error(500, f"{type(error).__name__}: {error}".splitlines()[0])

    return endpoint


async def _body(request: Request, limit: int) -> bytes:
    """The body, read no further than one chunk beyond the limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refused(413, f"the body has more than {limit} bytes")
    return bytes(body)


def _merged(body: dict[str, Any], request: Request) -> dict[str, Any]:
    """The message with the query's parameters, as vLLM's /pause?mode=abort&clear_cache=true has them."""
    for key, value in request.query_params.multi_items():
        if key in body:
            raise Refused(422, f"{key[:80]} is given twice")
        body[key] = {"true": True, "false": False}.get(value.lower(), value)
    return body


def _error(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"error": {"message": reason, "code": status}}, status)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail))
