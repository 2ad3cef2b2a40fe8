"""What an engine is: hf.py has transformers, vllm.py vLLM in this process, vllm_server.py a vLLM server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rlhf.rollout.sampling import Sample, Sampling


class Engine(Protocol):
    """What samples inside a worker, with weights that may change between two tokens."""

    @property
    def sleep_levels(self) -> tuple[int, ...]:
        """Those that `sleep` knows; 2 gives the weights away."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        turn: Callable[[], int | None],
    ) -> list[Sample]: ...
    def sleep(self, level: int) -> None: ...
    def wake_up(self, tags: Sequence[str]) -> bool: ...
