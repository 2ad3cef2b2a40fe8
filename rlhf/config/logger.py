"""Where metrics go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class LoggerConfig:
    """Where metrics go."""


@dataclass(slots=True, kw_only=True)
class ConsoleLoggerConfig(LoggerConfig):
    """A progress bar per stage and, at the end, a table."""


@dataclass(slots=True, kw_only=True)
class JsonlLoggerConfig(LoggerConfig):
    """`metrics.jsonl` in the run's folder: one object a step."""


@dataclass(slots=True, kw_only=True)
class TensorboardLoggerConfig(LoggerConfig):
    """TensorBoard event files in `tensorboard/` in the run's folder."""
