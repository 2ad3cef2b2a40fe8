"""The table of parts by kind and name: ours and others' in one, which imports nothing heavy.

Those of installed packages (offers.py) are known by name alone until they are chosen: a module that is broken costs
only the runs that use it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from typing import Any

from rlhf.plugins.offers import offered, offers, owner, package_of
from rlhf.plugins.part import KINDS, Part, PartError, imported
from transfer.agreement.shown import shown, told

_parts: dict[tuple[str, str], Part] = {}
_of_modules: dict[str, dict[tuple[str, str], Part]] = {}  # what the import of each module of `plugins` has registered


def register(part: Part) -> None:
    """Let a part be chosen by its name; PartError where it is not made as parts are, or its name is taken."""
    if not part.ours:
        _builtin()
    _check_made(part)
    there = _parts.get((part.kind, part.name))
    other = there.where if there is not None else None if part.ours else owner(part)
    if other not in (None, part.where):
        raise _taken(part, other)
    twice = [p for p in _parts.values() if p.config is part.config is not None and p.name != part.name]
    if twice:
        raise PartError(
            f"{part.where} registers {part.chosen} with the dataclass of {twice[0].chosen}: give it one of its own"
        )
    _parts[part.kind, part.name] = part


def choose(modules: Sequence[str]) -> None:
    """Set aside what other modules of `plugins` than these have registered, and take back what these have.

    PartError where two of these have registered the same name.
    """
    for module in [each for each in _of_modules if each not in sys.modules]:
        del _of_modules[module]
    for parts in _of_modules.values():
        for key, part in parts.items():
            if _parts.get(key) is part:
                del _parts[key]
    for module in modules:
        for part in _of_modules.get(module, {}).values():
            _put(part)


@contextmanager
def registering(module: str) -> Iterator[None]:
    """Note what the import of a module of `plugins` registers in this block, be it by modules that it imports."""
    before = dict(_parts)
    yield
    new = {key: part for key, part in _parts.items() if before.get(key) is not part}
    known = [part for parts in _of_modules.values() for part in parts.values()]
    own = [part for part in known if f"{part.where.partition(':')[0]}.".startswith(f"{module}.")]
    for part in own:  # another module has imported this one
        _put(part)
    _of_modules[module] = _of_modules.get(module, {}) | {(part.kind, part.name): part for part in own} | new


def readmit() -> None:
    """Take back what was set aside, but for names that several modules have."""
    every: dict[tuple[str, str], list[Part]] = {}
    for parts in _of_modules.values():
        for key, part in parts.items():
            every.setdefault(key, []).extend([] if part in every.get(key, ()) else [part])
    for key, found in every.items():
        if len(found) == 1:
            _parts.setdefault(key, found[0])


def _put(part: Part) -> None:
    there = _parts.setdefault((part.kind, part.name), part)
    if there.where != part.where:
        raise _taken(part, there.where)


def _taken(part: Part, other: str | None) -> PartError:
    return PartError(f"{part.where} registers {part.chosen}, which {other} has: give it another name")


def _check_made(part: Part) -> None:
    kind, said = KINDS[part.kind], f"{part.where} registers {part.chosen}"
    if not part.name.isidentifier():
        raise PartError(f"{said}: a name must be letters, digits and _ (got {shown(part.name)})")
    writes: Any = part.writes
    if not (isinstance(writes, Mapping) and all(isinstance(each, str) for pair in writes.items() for each in pair)):
        raise PartError(f'{said}: writes must be like {{"best.txt": "what it is"}} (got {shown(writes)})')
    if part.config is None and not kind.dial:
        raise PartError(f"{said} without a dataclass: give it one that builds on {kind.base.replace(':', '.')}")
    if part.config is None:
        return
    base = imported(kind.base)
    if not (isinstance(part.config, type) and is_dataclass(part.config)):
        raise PartError(f"{said} with {shown(part.config)}, which is no dataclass: mark it @dataclass(slots=True, ...)")
    if not (isinstance(base, type) and issubclass(part.config, base)):
        raise PartError(f"{said} with {part.config.__name__}, which must build on {kind.base.replace(':', '.')}")
    if part.config.__dictoffset__:  # it would take keys that it has not
        raise PartError(f"{said} with {part.config.__name__}: mark it @dataclass(slots=True, kw_only=True)")


def names(kind: str) -> list[str]:
    """What can be chosen of a kind: ours, then others'."""
    return list(dict.fromkeys([*(name for k, name in _loaded() if k == kind), *offered(kind)]))


def find(kind: str, name: str) -> Part:
    """The part of this name, imported if it is a package's; PartError lists what there is."""
    if part := _loaded().get((kind, name)):
        return part
    if name in offered(kind):
        return _load(kind, name)
    key = KINDS[kind].chosen("").rstrip("=")
    raise PartError(f"{key} must be one of {', '.join(names(kind))} (got {shown(name)})")


def find_loaded(kind: str, name: str) -> Part | None:
    """The part of this name, if nothing more need be imported for it."""
    return _loaded().get((kind, name))


def part_of(config: Any) -> Part:
    """The part that this configuration chooses."""
    found = _by_config(type(config))
    if found is None:  # it has come from another process, and its package is not loaded in this one
        for kind in KINDS:
            for name in offered(kind):
                if found is None:
                    with suppress(PartError):  # of another package
                        find(kind, name)
                    found = _by_config(type(config))
    assert found is not None, type(config)
    return found


def loaded() -> list[Part]:
    """Every part whose dataclass is known without importing anything more."""
    return list(_loaded().values())


def made(config: Any, *arguments: Any) -> Any:
    """What the part makes that this configuration chooses; PartError, in one line, where another's maker fails."""
    part = part_of(config)
    if part.ours:
        return part.maker()(config, *arguments)
    try:
        return part.maker()(config, *arguments)
    except PartError:
        raise
    except Exception as error:  # whatever the maker raises
        raise PartError(f"{part.chosen} ({part.where}) cannot be made: {told(error)}") from error


def _by_config(config: type) -> Part | None:
    return next((part for part in _loaded().values() if part.config is config), None)


def _loaded() -> Mapping[tuple[str, str], Part]:
    _builtin()
    return _parts


@functools.cache
def _builtin() -> None:
    importlib.import_module("rlhf.plugins.builtin")


def _load(kind: str, name: str) -> Part:
    """Import the package's module that registers this part; PartError names the package and what is wrong with it."""
    offer, *others = offers()[kind, name]
    chosen = KINDS[kind].chosen(name)
    if others:
        packages = " and ".join(sorted(package_of(each) for each in (offer, *others)))
        raise PartError(f"{chosen} is registered by {packages}: uninstall one, or have one of them rename it")
    said = f"{chosen}: the entry point {offer.value} of {package_of(offer)}"
    try:
        offer.load()
    except PartError as error:
        raise PartError(f"{said} is refused: {error}") from None
    except (Exception, SystemExit) as error:  # whatever the module raises
        raise PartError(f"{said} cannot be imported: {told(error)}") from error
    part = find_loaded(kind, name)
    if part is None:
        raise PartError(f'{said} registers no such part: decorate its maker with @{kind}("{name}", ...)')
    return part
