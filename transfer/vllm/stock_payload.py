"""What a vLLM server is told about weights: the JSON objects of its backend, whose form only that backend knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from transfer.engine.handles import Exporter
from transfer.engine.ipc import _pickled
from transfer.vllm.stock_routes import Dialect

if TYPE_CHECKING:
    import torch


class Payload(Protocol):
    """The words of one `--weight-transfer-config` backend, for one server."""

    reloads: bool  # whether vLLM is to prepare its own reloading at a start (0.24 asks)

    def init_info(self, dialect: Dialect, world_size: int) -> dict[str, Any]:
        """For /init_weight_transfer_engine; ValueError if the server has another number of ranks than this can feed."""

    def update_info(self, weights: Mapping[str, torch.Tensor], version: int) -> dict[str, Any]:
        """For /update_weights; ValueError or RuntimeError before the server is told anything."""

    def release(self) -> None:
        """The update is over, well or not: what update_info keeps alive may go."""


class StockIpc:
    """vLLM's own `ipc` backend, unpacked: a handle a tensor, in the legacy form that both dialects read.

    Every rank of the server looks for a handle under the UUID of its own GPU and releases it once, and torch counts one
    release an export. So each rank needs an export of its own, on its GPU: name the GPUs, by their index in this
    process, with `gpus`; a tensor that lies elsewhere is copied there for the time of the update. Two ranks on one GPU
    would read one handle and release it twice: the form has no place for a second one, so that is refused.
    """

    reloads = True

    def __init__(self, gpus: Sequence[int] | None = None) -> None:
        if gpus is not None and len(set(gpus)) != len(gpus):
            raise ValueError(f"gpus must be different ones, a rank of the server on each (got {list(gpus)})")
        self._gpus = None if gpus is None else list(gpus)
        self._exporter: Exporter | None = None

    def init_info(self, dialect: Dialect, world_size: int) -> dict[str, Any]:
        """`packed` exists since the later dialect; the earlier one refuses what it does not know."""
        ranks = 1 if self._gpus is None else len(self._gpus)
        if world_size != ranks:
            raise ValueError(
                f"the server has {world_size} ranks, handles would be made for {ranks}: StockIpc(gpus=...) must name "
                "the GPU of each rank"
            )
        return {"packed": False} if dialect is Dialect.v33 else {}

    def update_info(self, weights: Mapping[str, torch.Tensor], version: int) -> dict[str, Any]:
        """Names, dtypes, shapes, and base64 of the pickled handles: the four keys that both dialects know."""
        self.release()
        exporter = self._exporter = Exporter()
        handles = [self._handle(exporter, name, tensor) for name, tensor in weights.items()]
        exporter.ready()
        if len(places := set(map(frozenset, handles))) > 1:
            raise ValueError(
                f"the weights are on {len(places)} GPUs: name one a rank of the server, StockIpc(gpus=...)"
            )
        return {
            "names": list(weights),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()],
            "shapes": [list(tensor.shape) for tensor in weights.values()],
            "ipc_handles_pickled": _pickled(handles),
        }

    def release(self) -> None:
        """Let go of the exported memory."""
        if self._exporter is not None:
            self._exporter.close()
            self._exporter = None

    def _handle(self, exporter: Exporter, name: str, tensor: torch.Tensor) -> dict[str, tuple[Any, ...]]:
        """`{UUID: fields}` for all ranks."""
        if self._gpus is None:
            return exporter.add(name, tensor)[0]
        copies = [tensor.detach().to(f"cuda:{gpu}") for gpu in self._gpus]  # itself, where it is there already
        return {uuid: fields for copy in copies for uuid, fields in exporter.add(name, copy)[0].items()}


class RlhfIpc:
    """Our own backend (plugin.py): where the trainer's memory is, once, and then which version to take from it."""

    reloads = False

    def __init__(self) -> None:
        self.agreed: dict[str, Any] = {}  # what a session has agreed on: endpoint, manifest, where
        self.next: dict[str, Any] = {}  # of the update that is to come: version, where, digest

    def init_info(self, dialect: Dialect, world_size: int) -> dict[str, Any]:
        """Every rank maps the memory for itself."""
        return self.agreed

    def update_info(self, weights: Mapping[str, torch.Tensor], version: int) -> dict[str, Any]:
        """No tensor is named: all are where they were agreed to be."""
        return self.next

    def release(self) -> None:
        """The session keeps the memory."""
