"""The endpoint's HTTP: the routes, each under the key of a session, and errors in OpenAI's form.

POST /v1/chat/completions, POST /v1/completions, GET /v1/models       as OpenAI has them
POST /sessions/ID/reward                                              {"reward": 1.0}, which ends the session
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.types import Receive, Scope, Send

from rlhf.gateway import answers
from rlhf.gateway.calls import Calls, read_reward
from rlhf.gateway.forms import Request, read_chat, read_text
from rlhf.gateway.session import Session, Sessions
from transfer.agreement import wire
from transfer.agreement.wire import Refused
from transfer.worker.app import read_body, shallow

MAX_BODY = 16 * 2**20
THREADS = 8  # in which requests are read and prompts are made
READS = {"/v1/chat/completions": read_chat, "/v1/completions": read_text}
JSON, EVENTS = b"application/json", b"text/event-stream"
Answer = tuple[int, bytes, bytes]  # status, content type, body


class App:
    """An ASGI app."""

    def __init__(self, sessions: Sessions, calls: Calls) -> None:
        self._sessions, self._calls = sessions, calls
        self._pool = ThreadPoolExecutor(THREADS, "gateway")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request."""
        if scope["type"] != "http":
            return
        session = self._sessions.of([value for name, value in scope["headers"] if name == b"authorization"])
        if session is None:
            reason = "this needs the key of a session that goes on, in the Authorization header (OPENAI_API_KEY)"
            await _send(send, _error(401, reason), close=True)
            return
        try:
            answer = await self._answer(session, scope, receive)
        except Refused as refusal:
            answer = _error(refusal.status, refusal.reason)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            answer = _error(500, f"{type(error).__name__}: {error}".splitlines()[0])
        if answer is not None:
            await _send(send, answer)

    async def _answer(self, session: Session, scope: Scope, receive: Receive) -> Answer | None:
        method, path = scope["method"], scope["path"]
        if (method, path) == ("GET", "/v1/models"):
            return _json(answers.models())
        if method == "POST" and path in READS:
            return await self._sampled(session, path, scope, receive)
        if method == "POST" and path == f"/sessions/{session.id}/reward":
            body = await self._body(scope, receive)
            if body is None:
                return None
            session.end(read_reward(_read(body)))
            return _json({})
        raise Refused(404, f"there is no {method} {path} for this key")

    async def _body(self, scope: Scope, receive: Receive) -> bytearray | None:
        return await read_body(receive, MAX_BODY)

    async def _sampled(self, session: Session, path: str, scope: Scope, receive: Receive) -> Answer | None:
        body = await self._body(scope, receive)
        if body is None:
            return None
        loop = asyncio.get_running_loop()

        def begin() -> tuple[Request, Any]:
            request = READS[path](_read(body), session.terms.allowed)
            return request, self._calls.begin(session, request, len(body))

        request, pending = await loop.run_in_executor(self._pool, begin)
        if not await _there(asyncio.wrap_future(pending.answers), receive):
            return None  # nobody waits for it any more: it is not recorded
        choices = await loop.run_in_executor(self._pool, self._calls.finish, pending)
        if request.stream:
            return 200, EVENTS, answers.stream(request, len(pending.prompt), choices)
        return _json(answers.whole(request, len(pending.prompt), choices))

    def close(self) -> None:
        """No request is read any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


async def _there(future: asyncio.Future[Any], receive: Receive) -> bool:
    """Wait for it; False if the client has gone before."""
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([future, gone], return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    if future.done():
        return True
    future.cancel()
    return False


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":  # a body's end may come twice
        pass


def _read(body: bytearray) -> dict[str, Any]:
    try:
        return shallow(wire.loads(body, MAX_BODY))
    except Refused as refusal:
        raise Refused(413 if refusal.status == 413 else 400, refusal.reason) from None


def _json(value: Any) -> Answer:
    return 200, JSON, json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def _error(status: int, reason: str) -> Answer:
    kind = {401: "authentication_error", 500: "server_error"}.get(status, "invalid_request_error")
    error = {"message": reason[: wire.MAX_REASON], "type": kind, "code": status, "param": None}
    return status, JSON, json.dumps({"error": error}).encode()


async def _send(send: Send, answer: Answer, close: bool = False) -> None:
    status, kind, body = answer
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    headers += [(b"x-should-retry", b"false")] if status != 200 else []
    headers += [(b"connection", b"close")] if close else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
