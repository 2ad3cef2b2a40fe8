"""`.hydra/` in the folder of a run that a Python program has made: what reports, and whoever looks, find there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.config import RunConfig
from rlhf.preflight.objects import Objects
from rlhf.reports.run_folder import flat
from rlhf.shell.dials import replace
from rlhf.shell.going_on import GIVEN, given_to

MOST = 8  # dials that a line names


def note(config: RunConfig, folder: Path, objects: Objects, resume: bool) -> None:
    """Write what a command line has Hydra write; of a run that goes on, say what is other from here on."""
    from omegaconf import OmegaConf

    from rlhf.checkpoint.state import plain

    there = folder / ".hydra"
    dials = plain(config)
    before = _before(there / "config.yaml") if resume and given_to(folder) is not None else None
    if before is not None and (said := _differences(before, flat(dials))):
        print(f"other dials from here on: {said}")
    there.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {
        "config": {GIVEN: objects.named(), **dials},
        "overrides": [],
        "hydra": {"hydra": {"runtime": {"cwd": os.getcwd()}}},
    }
    for name, value in told.items():
        replace(there / f"{name}.yaml", OmegaConf.to_yaml(OmegaConf.create(value)))


def told_of(objects: Objects) -> str:
    """The objects by the arguments that gave them."""
    return ", ".join(f"{name}=" for name in objects.named())


def _before(path: Path) -> Mapping[str, Any]:
    from omegaconf import OmegaConf

    told: Any = OmegaConf.to_container(OmegaConf.load(path))
    return {key: value for key, value in flat(told).items() if not key.startswith(f"{GIVEN}.") and key != GIVEN}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    shown = [f"{key} is {now.get(key, 'gone')} (was {before.get(key, 'not there')})" for key in keys[:MOST]]
    return ", ".join([*shown, *([f"and {len(keys) - MOST} more"] if len(keys) > MOST else [])])
