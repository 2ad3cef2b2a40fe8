"""Where metrics go. No secret stands here: each service has its own variables in the environment."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class WandbMode(Enum):
    """Whether Weights & Biases is sent anything: `offline` keeps files for `wandb sync`."""

    online = "online"
    offline = "offline"


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


@dataclass(slots=True, kw_only=True)
class WandbLoggerConfig(LoggerConfig):
    """Weights & Biases (the extra `wandb`); the key is in WANDB_API_KEY, or `wandb login` has stored it."""

    project: str = "rlhf"
    entity: str | None = None  # user or team; null: the key's own
    mode: WandbMode = WandbMode.online


@dataclass(slots=True, kw_only=True)
class MlflowLoggerConfig(LoggerConfig):
    """MLflow (the extra `mlflow`); credentials are in MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN."""

    uri: str | None = None  # of a tracking server or store; null: MLFLOW_TRACKING_URI, or mlflow.db in the run's folder
    experiment: str = "rlhf"


@dataclass(slots=True, kw_only=True)
class TrackioLoggerConfig(LoggerConfig):
    """trackio (the extra `trackio`): a local database, which `trackio show` shows; TRACKIO_DIR says where it is."""

    project: str = "rlhf"
    space: str | None = None  # a Hugging Face Space to log to instead; the token is in HF_TOKEN
