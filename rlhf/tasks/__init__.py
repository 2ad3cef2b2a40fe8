"""Prompts and how an answer is scored.

In two steps, because the tiny model's tokenizer is made from the task's own characters: `read_task` gives texts
(raw.py), and `make_task` renders and tokenises them (tokenised.py). No policy and no worker is known here.
"""

from __future__ import annotations

from dataclasses import replace

from rlhf.config import TaskConfig
from rlhf.plugins.registry import made, part_of
from rlhf.tasks.raw import RawTask, Replies, Row
from rlhf.tasks.tokenised import make_task

__all__ = ["RawTask", "Replies", "Row", "make_task", "read_task"]


def read_task(config: TaskConfig, seed: int) -> RawTask:
    """The task's texts, the same for the same seed; ValueError if they cannot be had."""
    raw = made(config, seed)
    if not isinstance(raw, RawTask):
        raise ValueError(f"{part_of(config).chosen}: its maker must return a RawTask (got {type(raw).__name__})")
    if config.environment is None:
        return raw
    replies, chosen = made(config.environment), part_of(config.environment).chosen
    if not isinstance(replies, Replies):
        raise ValueError(f"{chosen}: its maker must return Replies (got {type(replies).__name__})")
    if raw.replies is not None:
        raise ValueError(f"{part_of(config).chosen} is a conversation already: leave out {chosen}")
    return replace(raw, replies=replace(replies, turns=config.environment.turns))
