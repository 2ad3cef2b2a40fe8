"""The worker that vllm_update.py times: rollout=vllm's, which takes updates by vLLM's own engine, too."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rlhf.rollout import completions
from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.vllm import VllmEngine
from rlhf.rollout.worker import Worker, parts_of
from transfer.worker.serve import serve_parent


class BenchWorker(Worker):
    """A worker that takes one-shot updates by vLLM's own engine, and answers whatever its weights are."""

    _engine: VllmEngine

    def completions(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Without asking whose weights these are."""
        request = completions.parse(body, self._limits)
        now = time.monotonic_ns()  # as if its weights were new: nothing of older ones is in the prefix cache
        samples = self._engine.generate(request.prompts, request.seeds, request.sampling, lambda: now)
        return completions.answer(request, samples)

    def update_weights(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """One whole update as vLLM does it."""
        llm: Any = self._engine._llm
        llm.start_weight_update(is_checkpoint_format=True)
        llm.update_weights({"update_info": dict(body["update_info"])})
        llm.finish_weight_update()
        llm.reset_prefix_cache()
        return {}


def main() -> None:
    """Serve the process that started this one."""
    spec = WorkerSpec.from_json(sys.stdin.buffer.readline())
    serve_parent(spec, lambda: BenchWorker(*parts_of(spec)))


if __name__ == "__main__":
    main()
