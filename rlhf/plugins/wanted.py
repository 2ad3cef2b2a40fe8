"""The modules that a command line's `plugins` names, which are imported before anything is composed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rlhf.plugins.part import PartError
from transfer.agreement.shown import shown

PLUGINS = "plugins"  # the key


def wanted(overrides: Sequence[str], folders: Sequence[Path]) -> list[list[str]]:
    """The modules that `plugins` and the experiment give a run; of a sweep, those of each job that has others.

    `folders`: where files of choices are looked for.
    """
    named, of_experiments = [[]], [[]]  # type: list[list[str]], list[list[str]]
    for override in overrides:  # the last one counts
        key, _, given = override.partition("=")
        if key.lstrip("+") == PLUGINS:
            named = [_modules(value) for value in _values(override)] or [[]]
        elif key == "experiment":
            of_experiments = [_of_experiment(name, folders) for name in given.split(",")]
    every = (tuple(dict.fromkeys([*first, *rest])) for first, rest in product(named, of_experiments))
    return [list(modules) for modules in dict.fromkeys(every)]


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
