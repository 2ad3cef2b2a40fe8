"""What a rank beside the first is started with: the run's configuration and its place, as one line of JSON.

A configuration is dataclasses, enums and JSON: each dataclass and enum goes by the name of its class, so that parts of
a user's own come back as what they were. The line comes from the parent process, over a pipe.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
from pathlib import Path
from typing import Any

from rlhf.config import RunConfig
from rlhf.ranks.place import Invitation, Place

CLASS, FIELDS, NAME = "class", "fields", "name"


def spec_of(config: RunConfig, folder: Path, place: Place, resume: bool) -> str:
    """All that another rank needs, in one line."""
    told = {"config": _told(config), "folder": str(folder.absolute()), "resume": resume}
    return json.dumps({**told, "place": dataclasses.asdict(place)})


def of_spec(line: str) -> tuple[RunConfig, Path, Place, bool]:
    """The inverse of `spec_of`."""
    told = json.loads(line)
    config = _heard(told["config"])
    place = told["place"]
    invitation = Invitation(**place.pop("invitation"))
    return config, Path(told["folder"]), Place(**place, invitation=invitation), told["resume"]


def _told(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return {CLASS: _path(type(value)), NAME: value.name}
    if dataclasses.is_dataclass(value):
        fields = {each.name: _told(getattr(value, each.name)) for each in dataclasses.fields(value)}
        return {CLASS: _path(type(value)), FIELDS: fields}
    if isinstance(value, dict):
        return {FIELDS: [[key, _told(held)] for key, held in value.items()]}
    return [_told(each) for each in value] if isinstance(value, (list, tuple)) else value


def _heard(told: Any) -> Any:
    if isinstance(told, list):
        return [_heard(each) for each in told]
    if not isinstance(told, dict):
        return told
    if CLASS not in told:
        return {key: _heard(held) for key, held in told[FIELDS]}
    module, _, name = told[CLASS].partition(":")
    kind: Any = importlib.import_module(module)
    for part in name.split("."):
        kind = getattr(kind, part)
    if NAME in told:
        return kind[told[NAME]]
    return kind(**{key: _heard(held) for key, held in told[FIELDS].items()})


def _path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
