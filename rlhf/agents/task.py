"""The task of an agent: rows of a file, and a program for each."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.agents.process import words_of
from rlhf.config.task import AgentTaskConfig
from rlhf.models.tool_calls import ToolFormat
from rlhf.tasks import given
from rlhf.tasks.files import task_of
from rlhf.tasks.raw import RawTask
from rlhf.tasks.staged import sources_at, unplayed
from rlhf.types import Environment, Tokenizer
from transfer.agreement.shown import shown


def agent_task(config: AgentTaskConfig, seed: int, *rows: Any) -> RawTask:
    """Read the rows; ValueError lists those that are bad, or says that there is no such program."""
    check_command(config.command)
    if config.tool_format is not None:
        ToolFormat.of(None, config.tool_format)
    raw = task_of(config, seed, *(given.sources_of(config, *rows) if rows else sources_at(config)))
    return replace(raw, gold=unplayed, surroundings=partial(_environment, config))


def check_command(command: str) -> None:
    """ValueError unless there is such a program, and its script, if it is given one."""
    words = words_of(command)
    if shutil.which(words[0]) is None:
        raise ValueError(f"task.command: there is no program {shown(words[0])}: give its path, or one that PATH has")
    script = next((word for word in words[1:] if not word.startswith("-")), "")
    if script.endswith(".py") and "-m" not in words and not Path(script).is_file():
        raise ValueError(f"task.command: there is no file {shown(script)} (seen from {Path.cwd()})")


def _environment(config: AgentTaskConfig, tokenizer: Tokenizer) -> Environment:
    from rlhf.agents.environment import AgentEnvironment

    return AgentEnvironment(config, tokenizer)
