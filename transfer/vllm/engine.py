"""Our weight-transfer engine inside an ordinary vLLM server (plugin.py), driven through vLLM's own routes.

    POST /init_weight_transfer_engine  {"init_info": {"endpoint", "manifest", "where"}}    what a session agrees on
    POST /start_weight_update          {"is_checkpoint_format": false}                     0.24; later no body
    POST /update_weights               {"update_info": {"version", "where"[, "digest"]}}   where the bytes wait
    POST /finish_weight_update

0.24 makes an engine from (config, parallel_config, model) and hands `receive_weights` a loader; later releases make it
from (config, vllm_config, device, model). An update is verified before and after it is written; one that breaks off
leaves the model torn, so that every later message but a new update is refused, and whoever drives the server must keep
it paused: vLLM has no way to refuse to serve. Versions only grow between two `init`s, each of which is a new trainer's.
Only shared memory of the backend `ipc` is taken, under a name that no file has: no path comes from a message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from transfer.agreement.shown import shown
from transfer.config import Staging, Take
from transfer.engine.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from transfer.memory.mark import WENT_ON
from transfer.memory.sums import SUMS
from transfer.vllm.rank import RankWeights
from transfer.vllm.reload import OwnWay

TAKES = (Take.view.value, Take.copy.value)
STAGINGS = tuple(each.value for each in Staging)


@dataclass
class RlhfInitInfo(WeightTransferInitInfo):
    """What is agreed on once: the session's endpoint, the manifest of its weights, and where they lie."""

    endpoint: dict[str, Any]
    manifest: dict[str, Any]
    where: dict[str, Any]


@dataclass
class RlhfUpdateInfo(WeightTransferUpdateInfo):
    """One update: its version, where its bytes wait, and their digest."""

    version: int
    where: dict[str, Any]
    digest: str | None = None
    update_kind: Literal["dense"] = "dense"  # 0.24 asks


class RlhfIpcEngine(WeightTransferEngine[RlhfInitInfo, RlhfUpdateInfo]):
    """Memory that trainer and vLLM both map, copied into the model's parameters where they are."""

    init_info_cls = RlhfInitInfo
    update_info_cls = RlhfUpdateInfo
    supports_draft_weight_update = False
    defers_processing = False

    def __init__(self, config: Any, second: Any, third: Any, model: torch.nn.Module | None = None) -> None:
        later = model is not None  # vLLM after 0.24: (config, vllm_config, device, model)
        super().__init__(config, second.parallel_config if later else second)
        self.vllm_config = second if later else None
        self.model: torch.nn.Module = third if model is None else model
        self.device = third if later else next(self.model.parameters()).device
        self._rank = RankWeights(self.model, self.device, OwnWay(self.model, self.device, self.vllm_config))
        self._version: int | None = None
        self._torn = ""

    def init_transfer_engine(self, init_info: RlhfInitInfo) -> None:
        """Map the trainer's memory; ValueError for any other than shared memory."""
        endpoint = init_info.endpoint
        others = endpoint.get("sockets", [])
        sockets = [endpoint.get("socket"), *(others if isinstance(others, list) else [others])]
        unnamed = all(isinstance(socket, str) and socket.startswith("\0") for socket in sockets)
        if endpoint.get("backend") != "ipc" or not unnamed:
            raise ValueError("the backend rlhf_ipc takes weights from shared memory alone (transfer=ipc)")
        for key, values in (("take", TAKES), ("staging", STAGINGS)):
            if endpoint.get(key) not in values:
                raise ValueError(f"endpoint.{key} must be one of {', '.join(values)} (got {shown(endpoint.get(key))})")
        self._rank.prepare(endpoint, init_info.manifest, init_info.where)
        self._version = None

    def start_weight_update(self) -> None:
        """Nothing: the old weights stay until the new ones are verified."""

    def finish_weight_update(self) -> None:
        """Nothing: `receive_weights` has done all. RuntimeError if that broke off."""
        if self._torn:
            raise RuntimeError(f"the weights are torn ({self._torn}): send another update before anything is served")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One update, as vLLM after 0.24 asks for it."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: RlhfUpdateInfo, load_weights: Callable[[Any], Any] | None = None) -> None:
        """Verify the staged bytes, copy them, and verify what was copied; ValueError leaves the old version whole
        unless it says torn."""
        if self._version is not None and update_info.version < self._version:
            raise ValueError(f"version {update_info.version} is older than the live {self._version}")
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise ValueError('start the update with {"is_checkpoint_format": false}: this backend reloads by itself')
        expected = update_info.digest
        free = expected is not None and expected.startswith(SUMS)
        if expected is not None and self._rank.settled:
            self._compare("staged", self._rank.digest(update_info.version, update_info.where, expected), expected)
        self._torn = f"version {update_info.version} broke off"
        said = self._rank.copy(update_info.version, update_info.where, free)
        if not said["finite"]:
            raise ValueError(f"version {update_info.version} has values that are not finite; the weights are torn")
        if expected is not None and (said["digest"] or not self._rank.settled):
            found = said["digest"] or self._rank.live_digest(update_info.version, update_info.where, expected)
            self._compare("copied", found, expected)
        if not said["still"]:
            raise ValueError(f"version {update_info.version}: {WENT_ON}; the weights are torn")
        self._version, self._torn = update_info.version, ""

    def _compare(self, which: str, found: str, expected: str) -> None:
        if found != expected:
            raise ValueError(f"the {which} weights have the digest {found}, and the trainer's have {expected}")

    # 0.32 and later retarget an engine for draft models, which this one refuses by `supports_draft_weight_update`
    def reset_weight_update_target(self) -> None:
        """Nothing was retargeted."""

    def drain_pending(self) -> None:
        """Nothing is deferred."""

    def shutdown(self) -> None:
        """Give up the trainer's memory."""
        self._rank.close()

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Not this way: a session sends the weights."""
        raise ValueError("weights for rlhf_ipc come from a session: transfer.make_transfer (its docstring shows how)")
