"""Which halves are made: by the trainer's configuration, and by the endpoint that a worker was told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transfer.backends.base import Intake, Publisher
from transfer.config import (
    CollectiveConfig,
    DiskConfig,
    HandlesConfig,
    IpcConfig,
    LocalConfig,
    Staging,
    TransferConfig,
)


def make_publisher(config: TransferConfig, folder: Path) -> Publisher:
    """The sending half of the configured backend; `folder` is where it may write."""
    match config:
        case IpcConfig(staging=staging):
            from transfer.backends.arena import ArenaPublisher, LivePublisher

            return LivePublisher(config) if staging is Staging.live else ArenaPublisher(config)
        case CollectiveConfig():
            from transfer.backends.collective import CollectivePublisher

            return CollectivePublisher(config)
        case DiskConfig():
            from transfer.backends.disk import DiskPublisher

            return DiskPublisher(config, folder)
        case LocalConfig():
            from transfer.backends.local import LocalPublisher

            return LocalPublisher()
        case HandlesConfig():
            from transfer.backends.local import HandlesPublisher

            return HandlesPublisher()
    raise ValueError(f"transfer must be one of ipc, gloo, nccl, disk, handles, local (got {type(config).__name__})")


def make_intake(endpoint: Mapping[str, Any]) -> Intake:
    """The receiving half that fits the trainer's endpoint."""
    match endpoint.get("backend"):
        case "ipc":
            from transfer.backends.arena import ArenaIntake

            return ArenaIntake(endpoint)
        case "disk":
            from transfer.backends.disk import DiskIntake

            return DiskIntake(endpoint)
        case "gloo" | "nccl":
            from transfer.backends.collective_intake import CollectiveIntake

            return CollectiveIntake(endpoint)
        case "local":
            from transfer.backends.local import LocalIntake

            return LocalIntake()
    raise ValueError(f"the endpoint's backend must be ipc, gloo, nccl, disk or local (got {endpoint.get('backend')!r})")
