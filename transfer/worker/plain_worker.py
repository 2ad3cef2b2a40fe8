"""A worker without a model: tensors of given names, dtypes and shapes, which take updates like any policy's weights.

The doctor, the benchmark and the fault tests drive it; `python -m transfer.worker.plain_worker` reads its spec
from stdin, a line of JSON, and reports its port (serve.py). Its answer to `completions` is the digest of
the weights it holds and the version that they go by: what a sampler would be seen to do with them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from transfer.agreement.journal import Journal
from transfer.agreement.manifest import Manifest
from transfer.backends.make import make_intake
from transfer.memory.digest import digest_of
from transfer.worker.landing import Landing
from transfer.worker.receiver import Receiver
from transfer.worker.serve import serve_parent


@dataclass(slots=True, kw_only=True)
class PlainSpec:
    """All that a plain worker needs to be built, as JSON."""

    manifest: dict[str, Any]  # Manifest.to_json of the weights that it holds
    endpoint: dict[str, Any]  # of the transfer session that will send them
    device: str = "cpu"
    token: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    journal: str = ""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


class PlainWorker(Receiver):
    """A Receiver around tensors that are zero until the first update."""

    def __init__(self, spec: PlainSpec) -> None:
        torch.set_num_threads(1)
        self._entries = Manifest.from_json(spec.manifest).entries
        self.weights: dict[str, torch.Tensor] = {}
        for entry in self._entries:
            tensor = torch.zeros(entry.shape, dtype=entry.torch_dtype, device=spec.device)
            self.weights |= dict.fromkeys(entry.names, tensor)
        journal = Journal(Path(spec.journal) if spec.journal else None)
        super().__init__(make_intake(spec.endpoint), Landing.of(Bag(self.weights)), journal)

    def health(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """That the process answers."""
        return {"status": "ok"}

    def completions(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The digest of the live weights, and their version; Refused 503 if there are none."""
        with self.serving() as turns:
            return {"version": turns(), "digest": digest_of(self.weights[entry.name] for entry in self._entries)}


class Bag(torch.nn.Module):
    """A module whose state_dict is these tensors, whatever their names."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._weights = weights

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """The tensors themselves."""
        return dict(self._weights)


def main() -> None:
    """Serve the process that started this one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spec = PlainSpec(**json.loads(sys.stdin.buffer.readline()))
    serve_parent(spec, lambda: PlainWorker(spec))


if __name__ == "__main__":
    main()
