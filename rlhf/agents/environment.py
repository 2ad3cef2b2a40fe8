"""What a run knows of an agent: how to start it, and how many at once; the agent itself says what follows an answer."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.agents.loop import Agents
from rlhf.config.task import AgentTaskConfig
from rlhf.rollout.client import RolloutClient
from rlhf.types import Episode, Prompt, Tokenizer


@dataclass(frozen=True, slots=True)
class AgentEnvironment:
    """Of a task; an `Environment` that has a sampler of its own."""

    config: AgentTaskConfig
    tokenizer: Tokenizer
    turns: int = 1  # how many there will be, nobody knows
    longest_reply: int = 0
    budget: int | None = None
    scores: bool = True
    opens: bool = False

    def __enter__(self) -> AgentEnvironment:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is held between two steps."""

    @property
    def places(self) -> None:
        """Processes at once are those of `config.concurrency` (loop.py)."""
        return None

    @property
    def timeout_s(self) -> float | None:
        """Of a whole process."""
        return self.config.timeout_s

    def episode(self, prompt: Prompt) -> Episode:
        """Nobody asks for one: programs are sampled by `sampler`."""
        raise AssertionError("agents are sampled by their own sampler")

    def sampler(self, client: RolloutClient) -> Agents:
        """What starts agents and samples for them."""
        return Agents(client, self.config, self.tokenizer)
