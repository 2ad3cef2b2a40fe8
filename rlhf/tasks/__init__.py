"""Prompts and how an answer is scored.

In two steps, because the tiny model's tokenizer is made from the task's own characters: `read_task` gives texts
(raw.py), and `make_task` renders and tokenises them (tokenised.py). No policy and no worker is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from rlhf.config import TaskConfig
from rlhf.plugins.part import Part, PartError
from rlhf.plugins.registry import made, part_of
from rlhf.tasks.raw import RawTask, Replies, Row
from rlhf.tasks.tokenised import make_task
from transfer.agreement.shown import shown, told

__all__ = ["RawTask", "Replies", "Row", "make_task", "read_task"]


def read_task(config: TaskConfig, seed: int, *rows: Any) -> RawTask:
    """The task's texts, the same for the same seed; ValueError if they cannot be had. `rows`: a Python program's."""
    raw = made(config, seed, *rows)
    if not isinstance(raw, RawTask):
        raise ValueError(f"{part_of(config).chosen}: its maker must return a RawTask (got {type(raw).__name__})")
    if not part_of(config).ours:
        _check_rows(config, raw)
        raw = _guarded(part_of(config), raw)
    if config.environment is None:
        return raw
    replies, part = made(config.environment), part_of(config.environment)
    chosen = part.chosen
    if not isinstance(replies, Replies):
        raise ValueError(f"{chosen}: its maker must return Replies (got {type(replies).__name__})")
    if not part.ours:
        replies = _guarded_replies(part, replies)
    if raw.replies is not None:
        raise ValueError(f"{part_of(config).chosen} is a conversation already: leave out {chosen}")
    return replace(raw, replies=replace(replies, turns=config.environment.turns))


def _guarded(part: Part, raw: RawTask) -> RawTask:
    """The task, whose functions' exceptions become a PartError that says whose they are."""
    gold = partial(_called, part, "gold function", raw.gold)
    return replace(raw, gold=gold, replies=None if raw.replies is None else _guarded_replies(part, raw.replies))


def _guarded_replies(part: Part, replies: Replies) -> Replies:
    return replace(replies, reply=partial(_called, part, "reply", replies.reply))


def _called(part: Part, what: str, function: Callable[..., Any], columns: Mapping[str, Any], said: Any) -> Any:
    try:
        return function(columns, said)
    except Exception as error:  # whatever it raises
        raise PartError(f"{part.chosen} ({part.where}): its {what} fails on {shown(said)}: {told(error)}") from error


def _check_rows(config: TaskConfig, raw: RawTask) -> None:
    """ValueError where another's task has no rows, rows of another kind, or more answers a row than it says."""
    chosen = part_of(config).chosen
    for name, rows in (("train", raw.train), ("held_out", raw.held_out)):
        other = next((row for row in rows if not isinstance(row, Row)), None)
        if other is not None or not rows:
            got = "none" if other is None else type(other).__name__
            raise ValueError(f"{chosen}: its RawTask must have rows in {name}, each a Row of rlhf.tasks (got {got})")
    turns = 1 if raw.replies is None else raw.replies.turns
    if config.environment is None and turns != config.most_answers:
        raise ValueError(
            f"{chosen}: its dataclass says most_answers={config.most_answers}, and its conversations have {turns}: let "
            "them be one, or leave out RawTask.replies and choose a task/environment"
        )
