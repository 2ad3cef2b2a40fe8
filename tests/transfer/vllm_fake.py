"""A vLLM server without a model: the weight-update routes of 0.24, 0.32 and 0.33, real HTTP, and weights on the CPU.

It refuses what vLLM refuses, in its words where they are known, is as strict about keys, and dies of what vLLM dies of.
Unlike vLLM it never unpickles: the legacy payload is read by transfer's own inert reader, every tensor of it.
"""

import asyncio
import hashlib
import json
import threading
import time
from contextlib import AbstractContextManager

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from transfer import IPCWeightTransferEngine

UPDATE_KEYS = {"names", "dtype_names", "shapes", "ipc_handles", "ipc_handles_pickled", "tensor_sizes"}
OLD_UPDATE_KEYS = UPDATE_KEYS | {"packed", "update_kind", "num_updates_list"}
TAGS = {"weights", "kv_cache"}

DIES = "dies"  # what a route may do once instead of its work: the process ends
DIES_AFTER = "dies after"  # it does the work, and ends before it has answered
HANGS = "hangs"  # neither work nor answer
IS_LATE = "is late"  # the work, but no answer
RESTARTS = "restarts"  # it does the work, and then forgets all of it


class PromptServer(uvicorn.Server):
    """One that looks often whether it is to end, and ends then without waiting for anybody."""

    async def main_loop(self):
        while not await self.on_tick(0):
            await asyncio.sleep(0.01)

    async def shutdown(self, sockets=None):
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await asyncio.sleep(0)


class FakeVllm(AbstractContextManager):
    """`with FakeVllm("0.24.0") as server: server.url`; afterwards look at `calls`, `weights` and `served_mixture`."""

    def __init__(self, version="0.33.0", *, weights=None, dev_mode=True, insecure=True, backend="ipc", world_size=1):
        self.version = version
        self.minor = int(version.split(".")[1]) if version.startswith("0.") else 99
        self.old = self.minor < 32
        self.dev_mode, self.insecure, self.backend, self.world_size = dev_mode, insecure, backend, world_size
        self.weights = {name: tensor.detach().clone() for name, tensor in (weights or {}).items()}
        self.label = "default"
        self.paused = self.updating = self.mixture = self.served_mixture = self.dead = False
        self.asleep = set()
        self.calls = []  # (method, path with query, body)
        self.infos = []  # of a backend that is not vLLM's own
        self.faults = {}  # path -> what it does once: a word from above, or a status
        self.model = hashlib.sha256(version.encode()).hexdigest()

    def __enter__(self):
        config = uvicorn.Config(self._app(), port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        self._server = PromptServer(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_):
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)

    def paths(self, *without):
        """The POSTs, in order."""
        paths = [path.partition("?")[0] for method, path, _ in self.calls if method == "POST"]
        return [path for path in paths if path not in without]

    def body(self, path):
        """What the only POST to this path said."""
        (body,) = [body for method, called, body in self.calls if method == "POST" and called.partition("?")[0] == path]
        return body

    # --- the server ---------------------------------------------------------------------------------------------------

    def _app(self):
        routes = {"/health": self._health, "/version": self._version, "/v1/completions": self._completions}
        if self.dev_mode:
            dev = ("pause", "resume", "is_paused", "sleep", "wake_up", "is_sleeping", "reset_prefix_cache")
            updates = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
            routes |= {f"/{name}": getattr(self, f"_{name}") for name in (*dev, *updates, "get_world_size")}
            if not self.old:
                routes["/weight_info"] = self._weight_info
        gets = {"/health", "/version", "/is_paused", "/is_sleeping", "/get_world_size", "/weight_info"}
        return Starlette(
            routes=[
                Route(path, _json_of(endpoint), methods=["GET" if path in gets else "POST"])
                for path, endpoint in routes.items()
            ],
            middleware=[Middleware(BaseHTTPMiddleware, dispatch=self._faulty)],
            exception_handlers={Exception: _error, Refusal: _error},
        )

    async def _faulty(self, request: Request, call_next):
        raw = await request.body()
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        self.calls.append((request.method, path, json.loads(raw) if raw else None))
        fault = self.faults.pop(request.url.path, None)
        if fault == DIES or self.dead:
            return self._die()
        if isinstance(fault, int):
            self.updating &= request.url.path != "/update_weights"  # one that failed is over, as in vLLM
            return JSONResponse({"error": {"message": f"planted in {request.url.path}", "code": fault}}, fault)
        if fault == HANGS:
            return await self._never()
        answer = await call_next(request)
        if fault == IS_LATE:
            return await self._never()
        if fault == RESTARTS:
            self.paused = self.updating = self.mixture = False
        return self._die() if fault == DIES_AFTER or self.dead else answer

    async def _never(self):
        while not self._server.should_exit:
            await asyncio.sleep(0.02)
        return Response(status_code=500)

    def _die(self):
        self.dead = True
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        return Response(status_code=500)

    async def _health(self, request: Request):
        return Response()

    async def _version(self, request: Request):
        return {"version": self.version}

    async def _get_world_size(self, request: Request):
        return {"world_size": self.world_size}

    async def _pause(self, request: Request):
        if request.query_params.get("mode", "abort") not in ("abort", "wait", "keep"):
            raise Refusal(400, "Input should be 'abort', 'wait' or 'keep'")
        self.paused = True
        return {"status": "paused"}

    async def _resume(self, request: Request):
        self.paused = False
        return {"status": "resumed"}

    async def _is_paused(self, request: Request):
        return {"is_paused": self.paused}

    async def _is_sleeping(self, request: Request):  # as vLLM: of a server that is merely paused, too
        return {"is_sleeping": self.paused or bool(self.asleep)}

    async def _sleep(self, request: Request):
        level = int(request.query_params.get("level", 1))
        self.paused = True
        if level:
            self.asleep = set(TAGS)
        if level == 2:
            self.weights = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
            self.mixture = True
        return Response() if self.old else {"status": "sleeping", "level": level}

    async def _wake_up(self, request: Request):
        self.asleep -= set(request.query_params.getlist("tags") or TAGS)
        if not self.asleep:
            self.paused = False
        return Response() if self.old else {"status": "sleeping" if self.asleep else "awake"}

    async def _reset_prefix_cache(self, request: Request):
        return Response() if self.old else {"success": not self.updating}

    async def _weight_info(self, request: Request):
        return {"weight_version": self.label}

    async def _init_weight_transfer_engine(self, request: Request):
        info = await self._object(request, "init_info")
        self._engine()
        if self.backend == "ipc":
            _only(info, set() if self.old else {"packed"}, "init_info", "Init")
        self.infos.append(info)
        return {"message": "Weight transfer initialized"}

    async def _start_weight_update(self, request: Request):
        if self.old:
            await self._json(request)
        self._engine()
        if self.updating:
            raise _failed(
                "start_weight_update called while a weight update is already active. Call finish_weight_update first."
            )
        self.updating = self.mixture = True
        self.loading = {}
        return {"message": "Weight update started"}

    async def _update_weights(self, request: Request):
        info = await self._object(request, "update_info")
        self._engine()
        if "weights" in self.asleep:
            return self._die()
        if not self.updating:
            raise _failed("start_weight_update must be called before update_weights.")
        try:
            if self.backend == "ipc":
                self._receive(info)
            else:
                self.infos.append(info)
                self.loading = dict(self.weights)
        except Exception:
            self.updating = False
            raise
        return {"message": "Weights updated"}

    def _receive(self, info):
        _only(info, OLD_UPDATE_KEYS if self.old else UPDATE_KEYS, "update_info", "Update")
        if "ipc_handles_pickled" in info and not self.insecure:
            raise _failed("Refusing to deserialize `ipc_handles_pickled` without VLLM_ALLOW_INSECURE_SERIALIZATION=1")
        engine = IPCWeightTransferEngine(None, None)
        engine.receive_weights(
            engine.parse_update_info({key: value for key, value in info.items() if key != "packed"}), self._load
        )

    def _load(self, pairs):
        for name, tensor in pairs:
            if name not in self.weights:
                raise _failed(f"There is no module or parameter named {name!r}")
            self.loading[name] = tensor.clone()

    async def _finish_weight_update(self, request: Request):
        label = None
        if not self.old and await request.body():
            body = await self._json(request)
            label = body.get("weight_version")
            if label is not None and not isinstance(label, str):
                raise Refusal(400, "body.weight_version: Input should be a valid string")
        self._engine()
        if not self.updating:
            raise _failed("finish_weight_update called without a matching start_weight_update.")
        self.mixture = set(self.loading) != set(self.weights)  # vLLM puts the old ones in silently for what is missing
        self.weights |= self.loading
        self.updating = False
        self.label = self.label if label is None else label
        return {"message": "Weight update finished"}

    async def _completions(self, request: Request):
        body = await self._json(request)
        if not body.get("temperature") and body.get("n", 1) > 1:
            raise Refusal(400, f"n must be 1 when using greedy sampling, got {body['n']}.")
        if not -(2**63) <= body.get("seed", 0) < 2**63:
            raise Refusal(400, "Input should be less than or equal to 9223372036854775807")
        if self.paused and self.minor >= 33:
            raise Refusal(503, "The server is paused")
        while self.paused:
            await asyncio.sleep(0.005)
        self.served_mixture |= self.mixture
        return {"choices": [self._choice(body, index) for index in range(body.get("n", 1))]}

    def _choice(self, body, index):
        """Up to max_tokens tokens that depend on prompt, seed and weights."""
        seed = (body["seed"] + index) if body["temperature"] else 0
        told = repr((body["prompt"], seed, [float(tensor.float().sum()) for tensor in self.weights.values()]))
        ids = [token % 50 for token in hashlib.sha256(told.encode()).digest()[: body["max_tokens"]]]
        stops = [position for position, token in enumerate(ids) if token in body["stop_token_ids"]]
        ids = ids[: stops[0] + 1] if stops else ids
        return {
            "index": index,
            "text": "",
            "logprobs": {"token_logprobs": [-1.0 - token / 100 for token in ids]} if "logprobs" in body else None,
            "finish_reason": "stop" if stops else "length",
            "token_ids": ids if body.get("return_token_ids") else None,
        }

    def _engine(self):
        if self.backend is None:
            raise _failed(
                "Weight transfer not configured. Please set weight_transfer_config to enable weight transfer."
            )

    async def _object(self, request, key):
        body = await self._json(request)
        if not isinstance(body.get(key), dict):
            raise Refusal(400, f"Missing '{key}' in request body")
        return body[key]

    async def _json(self, request):
        try:
            body = json.loads(await request.body())
        except ValueError:
            raise Refusal(400, "Invalid JSON format") from None
        return body


class Refusal(Exception):
    """An answer with a status and vLLM's words."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def _failed(message):
    """What an error in a worker becomes on its way through vLLM's engine."""
    return Refusal(
        500,
        f"Call to collective_rpc method failed: Worker failed with error '{message}', please check the stack trace "
        "above for the root cause",
    )


def _only(info, known, where, kind):
    for key in info:
        if key not in known:
            raise _failed(
                f"Invalid {where} for IPCWeightTransferEngine: IPCWeightTransfer{kind}Info.__init__() got an "
                f"unexpected keyword argument '{key}'"
            )


def _json_of(endpoint):
    async def answered(request: Request):
        answer = await endpoint(request)
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    return answered


async def _error(request, error):
    status = getattr(error, "status", 500)
    return JSONResponse({"error": {"message": str(error), "type": "InternalServerError", "code": status}}, status)
