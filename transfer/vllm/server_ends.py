"""A Receiver's two ends for a vLLM server that is reached by its own routes alone (stock_server.py).

The server keeps no state of an update that it would tell: the state machine is here, in the trainer's process. So
nothing fences two trainers of one server from each other: give it to one at a time.

    backend rlhf_ipc    the server's ranks map the trainer's memory (plugin.py): transfer=ipc
    backend ipc         vLLM's own: handles of the trainer's tensors, made anew for each update: transfer=local
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from transfer.agreement.manifest import Manifest
from transfer.backends.hold import newest
from transfer.config import Take
from transfer.vllm.stock import RlhfIpc, StockServer, update

Weights = Callable[[], Iterable[tuple[str, torch.Tensor]]]


class ServerIntake:
    """Agrees with the server once; nothing is staged before its update."""

    in_place = True
    unchecked = False
    settled = True
    slots: Sequence[dict[str, torch.Tensor]] = ()
    owner = torch.device("cpu")

    def __init__(self, endpoint: Mapping[str, Any], server: StockServer, weights: Weights) -> None:
        self._endpoint = {**endpoint, "take": Take.copy.value} if "take" in endpoint else dict(endpoint)
        self._server = server
        self._weights = weights

    def prepare(self, manifest: Manifest, where: Mapping[str, Any], device: torch.device) -> None:
        """Tell the server where the weights will be; TransferError if it is not fit for updates."""
        named: dict[str, torch.Tensor] = {}
        if isinstance(self._server.payload, RlhfIpc):
            agreed = {"endpoint": self._endpoint, "manifest": manifest.to_json(), "where": dict(where)}
            self._server.payload.agreed = agreed
        else:
            named = dict(self._weights())
        if self._server.dialect is None:
            self._server.open(named)
        else:
            self._server.agree()

    def stage(self, version: int, where: Mapping[str, Any]) -> dict[str, Any]:
        """What the server will be told, and what holds the trainer's weights still until then."""
        named = self._endpoint.get("hold")
        held = {} if named is None else {"hold": newest(named)}
        return {"version": version, "where": dict(where), **held}

    def still(self, version: int) -> bool:
        """As far as this process knows: our engine in the server looks for itself."""
        return True

    def close(self) -> None:
        """The server keeps what it has mapped until it is told otherwise."""


class ServerLanding:
    """The weights of the server; an update is all of its steps, from pause to resume."""

    def __init__(self, manifest: Manifest, server: StockServer, weights: Weights) -> None:
        self.manifest = manifest
        self.parameters = set(manifest.by_name)
        self.device = torch.device("cpu")
        self._server = server
        self._weights = weights
        self._digest: str | None = None

    @property
    def plan(self) -> str:
        """How copied weights get there, in words."""
        return f"the server's backend {'rlhf_ipc' if isinstance(self._server.payload, RlhfIpc) else 'ipc'}"

    def wants_block(self, slots: Sequence[Any]) -> bool:
        """Never: the memory is the server's."""
        return False

    def prepare(self, slots: Sequence[Any], owner: torch.device, copied: bool, empty: bool) -> None:
        """Nothing: the server has agreed."""

    def digest(self, staged: Mapping[str, Any], like: str) -> str:
        """The one that is expected: the server compares it by itself, before and after it copies."""
        if not isinstance(self._server.payload, RlhfIpc):
            raise ValueError("vLLM's own backend compares no digest: set transfer.verify=off")
        self._digest = like
        return like

    def live_digest(self, like: str, staged: Mapping[str, Any]) -> str:
        """Never: a server does not tell what it holds."""
        raise ValueError("a server does not tell what it holds: set transfer.verify to digest or off")

    def copy(self, staged: Mapping[str, Any], unchecked: bool, with_digest: bool) -> str | None:
        """The whole update; TransferError leaves the server paused where its weights may be a mixture."""
        payload, pairs = self._server.payload, self._weights()
        if isinstance(payload, RlhfIpc):
            payload.next = {**staged, "digest": self._digest} if self._digest else dict(staged)
            pairs = ()
        with staged["hold"].reading() if "hold" in staged else nullcontext():
            update([self._server], pairs, int(staged["version"]))
        return None

    def view(self, staged: Mapping[str, Any]) -> None:
        """Never: weights are copied."""
        raise AssertionError("a server's weights are copied")

    def forget(self) -> None:
        """Nothing is kept but the digest of an update that is over."""
        self._digest = None

    def close(self) -> None:
        """Close the connections."""
        self._server.close()
