"""A worker whose model is cut over several devices, as vLLM's tensor parallelism cuts it, behind the same verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from transfer.agreement.journal import Journal
from transfer.agreement.manifest import Manifest
from transfer.bench.worker import BenchWorker
from transfer.memory.digest import digest_of
from transfer.vllm.rank import RankWeights
from transfer.vllm.remote import Ranks, RemoteIntake, RemoteLanding
from transfer.worker.plain_worker import PlainSpec
from transfer.worker.receiver import Receiver

BY_COLUMNS = ("o_proj", "down_proj")  # the layers whose inputs are spread, in the names of a checkpoint
WHOLE = "norm"

Pairs = Iterable[tuple[str, torch.Tensor]]


def part_of(name: str, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What one of `size` ranks computes with: rows, columns, or all of it where it does not divide, as of norms."""
    dim = 1 if tensor.dim() == 2 and any(each in name for each in BY_COLUMNS) else 0
    if WHOLE in name or not tensor.dim() or tensor.shape[dim] % size:
        return tensor
    rows = tensor.shape[dim] // size
    return tensor.narrow(dim, rank * rows, rows)


class Part(torch.nn.Module):
    """One rank's model, with a loader as vLLM's are: it takes its part of each tensor of a checkpoint."""

    def __init__(self, manifest: Manifest, rank: int, size: int, device: torch.device) -> None:
        super().__init__()
        self._rank, self._size = rank, size
        self.parts = torch.nn.ParameterList()
        self._of: dict[str, torch.Tensor] = {}
        for entry in manifest.entries:
            shape = part_of(entry.name, torch.empty(entry.shape, device="meta"), rank, size).shape
            held = torch.nn.Parameter(torch.zeros(shape, dtype=entry.torch_dtype, device=device), requires_grad=False)
            self.parts.append(held)
            self._of[entry.name] = held

    @torch.no_grad()
    def load(self, pairs: Pairs) -> None:
        """Copy this rank's part of each."""
        for name, tensor in pairs:
            if name in self._of:  # else it is tied to one that is
                self._of[name].copy_(part_of(name, tensor, self._rank, self._size))

    reload = load


class TensorParallelWorker(BenchWorker):
    """A BenchWorker around a model in parts, on `devices`, which take an update at once."""

    def __init__(self, spec: PlainSpec, devices: list[str]) -> None:
        torch.set_num_threads(1)
        self._verb_seconds = 0.0
        manifest = Manifest.from_json(spec.manifest)
        places = [torch.device(device) for device in devices]
        self._parts = [Part(manifest, rank, len(places), device) for rank, device in enumerate(places)]
        count = len(places)
        self._ranks = [
            RankWeights(part, device, part, number, count)
            for number, (part, device) in enumerate(zip(self._parts, places, strict=True))
        ]
        self._pool = ThreadPoolExecutor(len(devices))
        ranks = Ranks(self._rpc)
        landing = RemoteLanding(manifest, places[0], ranks)
        Receiver.__init__(self, RemoteIntake(spec.endpoint, ranks), landing, Journal())

    def completions(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The digest of all parts, and the version."""
        with self.serving() as turns:
            held = [digest_of(part.parts) for part in self._parts]
            return {"version": turns(), "digest": " ".join(held)}

    def _rpc(self, verb: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        return list(self._pool.map(lambda rank: _answer(rank, getattr(rank, verb), body), self._ranks))


def _answer(rank: RankWeights, verb: Callable[..., Any], body: dict[str, Any]) -> dict[str, Any]:
    try:
        said = verb(**body)
    except (ValueError, OSError, RuntimeError) as error:
        return {"error": str(error)}
    return {**(said if isinstance(said, dict) else {"digest": said}), "plan": rank.plan}
