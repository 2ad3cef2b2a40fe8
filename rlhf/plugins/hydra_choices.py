"""Parts as choices of Hydra's groups: each is imported, and its dataclass looked at, when a composition asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from rlhf.plugins.part import KINDS, Part, PartError, imported
from rlhf.plugins.registry import find, find_loaded, names
from transfer.agreement.shown import told


@dataclass
class Later(ConfigNode):
    """A choice that is made when Hydra, which copies what it loads, loads it."""

    make: Callable[[], DictConfig]

    def __copy__(self) -> ConfigNode:
        try:
            return ConfigNode(self.name, self.make(), self.group, self.package, self.provider)
        except PartError as error:
            raise CompactHydraException(str(error)) from error


def register_parts() -> None:
    """Make every part known as `schema/<group>/<name>`, and as the choice itself, if no file of `conf/` is that."""
    for group in dict.fromkeys(kind.group for kind in KINDS.values()):
        kinds = [name for name, kind in KINDS.items() if kind.group == group]
        for name in dict.fromkeys(name for kind in kinds for name in names(kind)):
            parts = [find_loaded(kind, name) for kind in kinds]
            if any(part is not None and part.ours and part.config is None for part in parts):
                continue
            make = partial(_of_dials if KINDS[kinds[0]].dial else _of_choice, kinds, name)
            _store(f"schema/{group}", name, None, make)
            if not any(part is not None and part.ours for part in parts):
                _store(group, name, f"logger.{name}" if group == "logger" else None, make)


def _store(group: str, name: str, package: str | None, make: Callable[[], DictConfig]) -> None:
    ConfigStore.instance().store(name, {}, group, package, "rlhf.plugins")
    there: Any = ConfigStore.instance().repo
    for step in group.split("/"):
        there = there[step]
    file = f"{name}.yaml"
    there[file] = Later(file, OmegaConf.create(), group, package, "rlhf.plugins", make)


def _of_choice(kinds: list[str], name: str) -> DictConfig:
    return _structured(find(kinds[0], name))


def _of_dials(kinds: list[str], name: str) -> DictConfig:
    """An algorithm whose loss or advantage, or both, are parts of that name, unless its dataclass says otherwise."""
    parts = [find(kind, name) for kind in kinds if name in names(kind)]
    own = [part for part in parts if part.config is not None]
    if not own:
        raise PartError(f"algo={name}: {parts[0].chosen} has no dials of its own: choose it beside another algo")
    if len({part.config for part in own}) > 1:
        raise PartError(f"algo={name} is {' and '.join(part.chosen for part in own)}: give them one dataclass")
    node, base = _structured(own[0]), {each.name: each.default for each in fields(imported(KINDS[kinds[0]].base))}
    defaults = {each.name: each.default for each in fields(own[0].config)}  # type: ignore[arg-type]
    for key in ("name", *(part.kind for part in own)):
        if defaults[key] in (MISSING, base[key]):
            node[key] = name
    return node


def _structured(part: Part) -> DictConfig:
    try:
        return OmegaConf.structured(part.config)
    except Exception as error:  # also of annotations that cannot be looked up
        raise PartError(
            f"{part.chosen}: its dataclass of {part.where} is none of a configuration: {told(error)}"
        ) from None
