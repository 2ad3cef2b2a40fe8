"""Parts of installed packages, by their entry points, and of modules that a run's `plugins` names.

A package's module is imported when one of its parts is chosen: one that is broken costs only the runs that use it.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from rlhf.plugins.registry import KINDS, Part, PartError, find_loaded, loaded, told

Offers = Mapping[tuple[str, str], Sequence[metadata.EntryPoint]]


def offered(kind: str) -> list[str]:
    """The names of the installed packages' parts."""
    return [name for of_kind, name in _entry_points() if of_kind == kind]


def owner(part: Part) -> str | None:
    """The package that offers a part of this name, if it is not the one that registers it."""
    others = _entry_points().get((part.kind, part.name), ())
    mine = part.where.partition(":")[0].partition(".")[0]
    return next((_package(each) for each in others if each.module.partition(".")[0] != mine), None)


def load(kind: str, name: str) -> Part:
    """Import the package's module that registers this part; PartError names the package and what is wrong with it."""
    offers = _entry_points()[kind, name]
    chosen = KINDS[kind].chosen(name)
    if len(offers) > 1:
        packages = " and ".join(sorted(_package(each) for each in offers))
        raise PartError(f"{chosen} is registered by {packages}: uninstall one, or have one of them rename it")
    (offer,) = offers
    said = f"{chosen}: the entry point {offer.value} of {_package(offer)}"
    try:
        offer.load()
    except PartError as error:
        raise PartError(f"{said} is refused: {error}") from None
    except Exception as error:  # whatever the module raises
        raise PartError(f"{said} cannot be imported: {told(error)}") from error
    part = find_loaded(kind, name)
    if part is None:
        raise PartError(f'{said} registers no such part: decorate its maker with @{kind}("{name}", ...)')
    return part


def use(modules: Sequence[str]) -> None:
    """Import the modules that `plugins` names, for what they register; PartError names the one that is wrong."""
    if modules and os.getcwd() not in sys.path:  # as `python -m` does; a console script does not
        sys.path.append(os.getcwd())
    for module in modules:
        said = f"plugins: {module}"
        if not all(each.isidentifier() for each in str(module).split(".")):
            raise PartError(f"plugins must be a list of modules like [package.module] (got {module!r})")
        try:
            importlib.import_module(module)
        except PartError:
            raise
        except Exception as error:  # whatever the module raises
            raise PartError(
                f"{said} cannot be imported, from the current folder or the Python path: {told(error)}"
            ) from error
        package = module.partition(".")[0]
        if not any(part.where.partition(":")[0].partition(".")[0] == package for part in loaded()):
            raise PartError(f"{said} registers nothing: decorate what it makes, as in docs/configuration.md")


@functools.cache
def warn() -> None:
    """Say on stderr, once, which packages offer parts by names that are taken."""
    for part in loaded():
        for each in _entry_points().get((part.kind, part.name), ()) if part.ours else ():
            print(
                f"warning: {part.chosen} of {_package(each)} is left out, as there is one already: its entry point "
                f"{each.value} needs another name",
                file=sys.stderr,
            )


def _package(offer: metadata.EntryPoint) -> str:
    return f"the package {offer.dist.name}" if offer.dist is not None else offer.module


@functools.cache
def _entry_points() -> Offers:
    """What installed packages offer, looked up once."""
    every = metadata.entry_points()
    found: dict[tuple[str, str], list[metadata.EntryPoint]] = {}
    for kind, each in KINDS.items():
        for offer in every.select(group=each.entry_points):
            found.setdefault((kind, offer.name), []).append(offer)
    return found
