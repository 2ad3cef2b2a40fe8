"""A Receiver's two ends for weights that live in a vLLM engine: what would be done to a module is told to its ranks.

The state machine, the gate and the journal stay in one process (transfer/worker). Each rank, a process of its own or
this one, has the method `rlhf_weights` (extension.py); all carry out the same message, and one that fails fails it for
all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from transfer.agreement.manifest import Manifest
from transfer.config import Staging, Take
from transfer.memory.finite import NotFinite
from transfer.memory.mark import WENT_ON
from transfer.memory.sums import SUMS, added

Rpc = Callable[[str, dict[str, Any]], list[dict[str, Any]]]  # verb, body -> what each rank says


class Ranks:
    """All workers of one engine; `plan` is how they take weights."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self.plan = "nothing has come yet"

    def call(self, verb: str, **body: Any) -> list[dict[str, Any]]:
        """What each rank says; ValueError with the reasons of those that have failed."""
        answers = self._rpc(verb, body)
        failed = [f"rank {rank}: {said['error']}" for rank, said in enumerate(answers) if "error" in said]
        if failed:
            raise ValueError("; ".join(failed))
        self.plan = answers[0]["plan"] if answers else self.plan
        return answers


class RemoteIntake:
    """Tells the ranks where the trainer's memory is; what they stage is named by its version and place."""

    in_place = True

    def __init__(self, endpoint: Mapping[str, Any], ranks: Ranks) -> None:
        self._endpoint = {**endpoint, "take": Take.copy.value} if "take" in endpoint else dict(endpoint)
        self._ranks = ranks
        self.settled = endpoint.get("staging") != Staging.live.value
        self.unchecked = False  # ranks look at what nobody has looked at
        self.slots: Sequence[dict[str, torch.Tensor]] = ()
        self.owner = torch.device("cpu")

    def prepare(self, manifest: Manifest, where: Mapping[str, Any], device: torch.device) -> None:
        """Let every rank map the memory; ValueError with the reason of one that cannot."""
        self._ranks.call("prepare", endpoint=self._endpoint, manifest=manifest.to_json(), where=dict(where))
        self.slots = [{} for _ in range(int(where.get("slots", 0)))]

    def stage(self, version: int, where: Mapping[str, Any]) -> dict[str, Any]:
        """What the ranks must be told to find these weights."""
        return {"version": version, "where": dict(where)}

    def still(self, version: int) -> bool:
        """As far as this process knows: ranks look for themselves."""
        return True

    def close(self) -> None:
        """Let every rank give the memory up."""
        self.slots = ()
        self._ranks.call("close")


class RemoteLanding:
    """The weights of an engine, known by the manifest of the checkpoint that it was made for."""

    def __init__(self, manifest: Manifest, device: torch.device, ranks: Ranks) -> None:
        self.manifest = manifest
        self.parameters: set[str] = set(manifest.by_name)
        self.device = device
        self._ranks = ranks

    @property
    def plan(self) -> str:
        """How copied weights get there, in words."""
        return self._ranks.plan

    def wants_block(self, slots: Sequence[Any]) -> bool:
        """Never: the engine's memory is laid out as its kernels want it."""
        return False

    def prepare(self, slots: Sequence[Any], owner: torch.device, copied: bool, empty: bool) -> None:
        """Nothing: the ranks look at the first update."""

    def digest(self, staged: Mapping[str, Any], like: str) -> str:
        """Of staged weights: sums that the ranks share among them, or another kind as the first reads them."""
        digests = [str(said["digest"]) for said in self._ranks.call("digest", **staged, like=like)]
        return added(digests) if like.startswith(SUMS) else digests[0]

    def live_digest(self, like: str, staged: Mapping[str, Any]) -> str:
        """Of the model's own bytes; ValueError where no rank holds all of them in the trainer's form."""
        return str(self._ranks.call("live_digest", **staged, like=like)[0]["digest"])

    def copy(self, staged: Mapping[str, Any], unchecked: bool, with_digest: bool) -> str | None:
        """Into the model, in all ranks; the digest, if it cost nothing. NotFinite, with a mixture in the model."""
        if staged.keys() != {"version", "where"}:
            raise ValueError("inside vLLM weights come from a session: one-shot messages are for vLLM's own routes")
        answers = self._ranks.call("copy", **staged, with_digest=with_digest)
        if not all(said["finite"] for said in answers):
            raise NotFinite("the weights have values that are not finite")
        if not all(said["still"] for said in answers):
            raise ValueError(WENT_ON)
        digests = {said["digest"] for said in answers}
        return digests.pop() if len(answers) == 1 else None

    def view(self, staged: Mapping[str, Any]) -> None:
        """Never: weights are copied."""
        raise AssertionError("vLLM's weights are copied")

    def forget(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """The engine belongs to whoever made it."""
