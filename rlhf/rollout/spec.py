"""What a worker is told when it starts: its spec, a line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transfer.agreement import wire


@dataclass(slots=True, kw_only=True)
class WorkerSpec:
    """All that a worker needs to be built, as JSON; holds the token, so it travels through a pipe or a 0600 file."""

    architecture: dict[str, Any]  # a transformers config; its `model_type` chooses the class
    endpoint: dict[str, Any]  # of the transfer session that will send the weights
    dtype: str = "float32"
    device: str = "cpu"
    visible: list[str] = field(default_factory=list)  # CUDA_VISIBLE_DEVICES, of each worker; []: as they are
    attention: str = "sdpa"
    code: str = ""  # the trusted checkpoint whose own code the model is made of; empty: transformers' code
    engine: str = "hf"  # or vllm
    engine_args: dict[str, Any] = field(default_factory=dict)  # of engine vllm (rlhf/config/rollout.py)
    keep_prefix_cache: bool = False  # of engine vllm, across updates
    recompute_cache: bool = False  # of rows that new weights find in the middle
    batch_invariant: bool = False  # a row's bits do not depend on the rows beside it
    threads: int = 1
    token: str = ""  # bearer token of HTTP; empty: whoever reaches the loopback port may call
    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one
    journal: str = ""  # file in which the worker notes what it did with weights; empty: nowhere
    adapter: dict[str, Any] | None = None  # an AdapterSpec: updates carry the adapter alone; null: all weights

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype of a worker must be float32, bfloat16 or float16 (got {self.dtype!r})")
        if self.engine not in ("hf", "vllm"):
            raise ValueError(f"engine of a worker must be hf or vllm (got {self.engine!r})")
        if "model_type" not in self.architecture:
            raise ValueError("architecture of a worker must be a transformers config with a model_type")

    @property
    def log(self) -> Path | None:
        """The worker's log, in the folder of its run; None of a worker without one."""
        journal = Path(self.journal)
        return journal.parent.parent / f"{journal.stem}.log" if self.journal else None

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: str | bytes) -> WorkerSpec:
        """The inverse of `to_json`; ValueError for a key that no spec has or a value that is not allowed."""
        try:
            values = wire.loads(raw)
        except wire.Refused as error:
            raise ValueError(f"the worker's spec: {error}") from None
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"the worker's spec has unknown keys {unknown}; known: {sorted(known)}")
        if missing := {"architecture", "endpoint"} - set(values):
            raise ValueError(f"the worker's spec lacks {sorted(missing)}")
        return cls(**values)
