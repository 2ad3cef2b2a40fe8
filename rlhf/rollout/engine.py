"""What an engine is: hf.py has transformers, vllm.py vLLM in this process, vllm_server.py a vLLM server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlhf.rollout.sampling import Sample, Sampling


@dataclass(frozen=True, slots=True)
class Turn:
    """What a completion asks between two tokens: the version of the weights, which may change meanwhile, or None: end.

    Where nothing is `due`, it would tell what it told before.
    """

    take: Callable[[], int | None]
    due: Callable[[], bool] = lambda: True

    def __call__(self) -> int | None:
        return self.take()


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
