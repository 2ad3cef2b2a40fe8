"""vLLM loads this by the entry point `vllm.general_plugins`, and then knows the weight-transfer backend `rlhf_ipc`.

vllm serve MODEL --weight-transfer-config '{"backend": "rlhf_ipc"}'
"""

from __future__ import annotations

import os

from transfer.worker.stacks import VARIABLE, dumps_stacks_when_asked

BACKEND = "rlhf_ipc"


def register() -> None:
    """Make the backend known; called by vLLM in each of its processes, perhaps more than once.

    In a vLLM that a run of ours has started each of them dumps its stacks when asked, too.
    """
    if log := os.environ.get(VARIABLE):
        dumps_stacks_when_asked(log)
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "transfer.vllm.engine", "RlhfIpcEngine")
