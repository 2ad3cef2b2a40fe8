"""The modules that a command line's `plugins` names, which are imported before anything is composed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.plugins.part import PartError
from transfer.agreement.shown import shown

PLUGINS = "plugins"  # the key


def wanted(overrides: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The modules of every `plugins` that a run may have: those of all jobs of a sweep, and of its experiments.

    `folders`: where files of choices are looked for.
    """
    modules: dict[str, None] = {}
    for override in overrides:
        key, _, given = override.partition("=")
        if key.lstrip("+") == PLUGINS:
            modules |= dict.fromkeys(module for value in _values(override) for module in _modules(value))
        elif key == "experiment":
            modules |= dict.fromkeys(module for name in given.split(",") for module in _of_experiment(name, folders))
    return list(modules)


def _values(override: str) -> Iterator[Any]:
    """What an override gives its key; of a sweep, each of them. Nothing where it cannot be read: Hydra says so."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
        yield from parsed.sweep_iterator() if parsed.is_sweep_override() else [parsed.value()]
    except HydraException:
        return


def _modules(value: Any) -> list[str]:
    """A list of modules, of which a sweep has made a text."""
    if isinstance(value, str) and value.startswith("["):
        value = [each.strip() for each in value.strip("[]").split(",") if each.strip()]
    if not isinstance(value, list):
        raise PartError(f"plugins must be a list of modules: plugins=[package.module] (got {shown(value)})")
    return [str(getattr(each, "text", each)) for each in value]


def _of_experiment(name: str, folders: Sequence[Path]) -> list[str]:
    """What an experiment's file says of `plugins`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    files = [folder / "experiment" / f"{name}.yaml" for folder in folders]
    for file in files:
        try:
            told: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
        except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError):  # which Hydra says
            continue
        if isinstance(told, dict) and PLUGINS in told:
            return _modules(told[PLUGINS])
    return []
