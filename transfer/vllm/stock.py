"""Drives unmodified vLLM servers over HTTP: their weights are the trainer's version v, or they are paused.

    server = StockServer("http://127.0.0.1:8000")
    server.open(module.state_dict())                       # agree on names, dtypes and shapes; find the dialect
    update([server], module.named_parameters(), version=0)
    server.complete({"prompt": [[1, 5]], "seeds": [3], "n": 2, ...})

One update, of one server or of several together:

    verify     names, dtypes, shapes, finite values, handles: all before any server is told anything
    awake?     a stock server that updates while asleep crashes
    pause      then start, update and finish, each to all servers before the next
    resume     only if every server took everything

vLLM has no abort. A failure before `start` leaves the old weights, and the servers go on; after one from `start` on, a
server may hold a mixture: all stay paused until an update succeeds, and the TransferError says so.

A server needs VLLM_SERVER_DEV_MODE=1, and for its own `ipc` backend `--weight-transfer-config '{"backend": "ipc"}'` and
VLLM_ALLOW_INSECURE_SERIALIZATION=1. Another backend is another `Payload` (stock_payload.py) over the same routes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from transfer.agreement.wire import RemoteError, TransferError
from transfer.vllm.stock_payload import Payload, RlhfIpc, StockIpc
from transfer.vllm.stock_routes import Dialect
from transfer.vllm.stock_server import StockServer, UpdatePolicy

if TYPE_CHECKING:
    import torch

__all__ = ["Dialect", "Payload", "RlhfIpc", "StockIpc", "StockServer", "UpdatePolicy", "update"]

Step = Callable[[StockServer], None]


def update(servers: Sequence[StockServer], pairs: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
    """Make the tensors the weights of all servers, as `version`; TransferError names those that failed, and the phase.

    From the first start on, a failure leaves all of them paused; those that took everything are finished first, or no
    other update could reach them.
    """
    weights = _gathered(pairs, version)
    if any(server.policy.finite for server in servers):
        _check_finite(weights, version)
    with contextlib.ExitStack() as released:
        for server in servers:
            released.callback(server.payload.release)
        infos = {server.name: server.verified(weights, version) for server in servers}
        pool = released.enter_context(ThreadPoolExecutor(max(1, len(servers)), thread_name_prefix="stock"))
        with _going_on(servers):
            _all("awake?", version, _each(pool, servers, StockServer.check_awake))
            _all("pause", version, _each(pool, servers, StockServer.pause))
        _carry(pool, servers, infos, version)
        _all("resume", version, _each(pool, servers, StockServer.resume))


def _carry(
    pool: ThreadPoolExecutor, servers: Sequence[StockServer], infos: Mapping[str, Mapping], version: int
) -> None:
    """Start, update and finish; who fails in one is not told the next."""
    left, lines = list(servers), []
    phases: list[tuple[str, Step]] = [
        ("start_weight_update", StockServer.start),
        ("update_weights", lambda server: server.send(infos[server.name])),
        ("finish_weight_update", lambda server: server.finish(version)),
    ]
    for phase, step in phases:
        for server, error in _each(pool, left, step):
            state = server.keep_paused(f"{phase} of version {version} failed, and its weights may be a mixture")
            lines.append(f"{error}; it {state}: its weights may be a mixture; update it again, or start it anew")
            left.remove(server)
    if lines:
        for server in left:
            server.held = f"version {version}, which it has, failed elsewhere"
            lines.append(f"{server.name} has it and is kept paused, too")
        raise TransferError(f"version {version} failed: " + "; ".join(lines))


def _each(pool: ThreadPoolExecutor, servers: Sequence[StockServer], step: Step) -> list[tuple[StockServer, Exception]]:
    """The step, in all servers at once: who failed, and how."""
    jobs = [(server, pool.submit(step, server)) for server in servers]
    failures = [(server, job.exception()) for server, job in jobs]  # every call has a deadline
    for _, error in failures:
        if error is not None and not isinstance(error, RemoteError | TransferError):
            raise error
    return [(server, error) for server, error in failures if isinstance(error, Exception)]


def _all(phase: str, version: int, failures: Sequence[tuple[StockServer, Exception]]) -> None:
    if failures:
        raise TransferError(f"version {version}: {phase} failed: " + "; ".join(str(error) for _, error in failures))


@contextlib.contextmanager
def _going_on(servers: Sequence[StockServer]):
    """Whatever fails in here has not touched any weights: servers whose weights are whole sample again."""
    try:
        yield
    except BaseException:
        for server in servers:
            with contextlib.suppress(RemoteError, TransferError):
                server.resume()
        raise


def _gathered(pairs: Iterable[tuple[str, torch.Tensor]], version: int) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in pairs:
        if name in weights:
            raise TransferError(f"version {version}: {name} comes twice")
        weights[name] = tensor.detach()
    return weights


def _check_finite(weights: Mapping[str, torch.Tensor], version: int) -> None:
    from transfer.agreement.manifest import Manifest
    from transfer.memory.finite import not_finite

    try:
        bad = not_finite(weights, Manifest.of(weights))
    except ValueError as error:
        raise TransferError(f"version {version} cannot be sent: {error}") from error
    if bad is not None:
        raise TransferError(f"version {version}: {bad} has values that are not finite; nobody has been told of it")
