"""How a run that was stopped goes on, as messages say it: by a command, or in the Python program that has run it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GIVEN = "given"  # in a run's .hydra/config.yaml: the objects that a Python program gave it, perhaps none


def given_to(folder: Path) -> Mapping[str, Any] | None:
    """What a Python program gave the run of this folder, by kind; None of a run of the command line."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = folder / ".hydra" / "config.yaml"
    try:
        told: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException):  # it may be anybody's
        return None
    given = told.get(GIVEN) if isinstance(told, dict) else None
    return given if isinstance(given, dict) else None


def goes_on_by(folder: Path) -> str:
    """A command, or a call."""
    if given_to(folder) is None:
        return f"python -m rlhf.resume {shlex.quote(str(folder))}"
    return f"rlhf.train(..., folder={str(folder)!r}, resume=True)"
