"""Prompts and how an answer is scored.

In two steps, because the tiny model's tokenizer is made from the task's own characters: `read_task` gives texts
(raw.py), and `make_task` renders and tokenises them (tokenised.py).
"""

from __future__ import annotations

from rlhf.config import (
    ArithmeticTaskConfig,
    GuessTaskConfig,
    JsonlTaskConfig,
    ReasoningGymTaskConfig,
    ReverseTaskConfig,
    SortTaskConfig,
    TaskConfig,
)
from rlhf.tasks.raw import RawTask, Replies, Row
from rlhf.tasks.tokenised import make_task

__all__ = ["RawTask", "Replies", "Row", "make_task", "read_task"]


def read_task(config: TaskConfig, seed: int) -> RawTask:
    """The task's texts, the same for the same seed; ValueError if they cannot be had."""
    match config:
        case SortTaskConfig() | ReverseTaskConfig():
            from rlhf.tasks.procedural import sequence_task

            return sequence_task(config, seed)
        case ArithmeticTaskConfig():
            from rlhf.tasks.procedural import arithmetic_task

            return arithmetic_task(config, seed)
        case GuessTaskConfig():
            from rlhf.tasks.guess import guess_task

            return guess_task(config, seed)
        case ReasoningGymTaskConfig():
            from rlhf.tasks.reasoning_gym import reasoning_gym_task

            return reasoning_gym_task(config, seed)
        case JsonlTaskConfig():
            from rlhf.tasks.jsonl import jsonl_task

            return jsonl_task(config, seed)
    raise AssertionError(f"no task is made from {type(config).__name__}")
