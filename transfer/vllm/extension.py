"""What our own vLLM worker adds to each of vLLM's (`worker_extension_cls`): one method, called by `collective_rpc`."""

from __future__ import annotations

from typing import Any

import torch

from transfer.agreement.wire import Refused
from transfer.memory.finite import NotFinite
from transfer.vllm.rank import RankWeights
from transfer.vllm.reload import OwnWay

CLASS = f"{__name__}.WeightsExtension"


class WeightsExtension:
    """Mixed into vLLM's worker class, which has `model_runner`, `device`, `vllm_config` and `model_config`."""

    rlhf_rank: RankWeights | None = None

    def rlhf_weights(self, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        """Carry out one method of RankWeights; `{"error": ...}` says why it was not."""
        worker: Any = self
        try:
            if self.rlhf_rank is None:
                model = worker.model_runner.get_model()
                own_way = OwnWay(model, worker.device, worker.vllm_config)
                count = worker.vllm_config.parallel_config.world_size
                self.rlhf_rank = RankWeights(model, worker.device, own_way, worker.rank % count, count)
            with torch.no_grad():
                said = getattr(self.rlhf_rank, verb)(**body)
        except (ValueError, OSError, RuntimeError, Refused, NotFinite) as error:
            return {"error": f"{error}" or type(error).__name__, "plan": ""}
        result = said if isinstance(said, dict) else {"digest": said}
        plan = self.rlhf_rank.plan
        return {**result, "plan": plan}
