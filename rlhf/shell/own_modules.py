"""Modules of a user's own: found in the current folder, on the Python path, or where the run was started."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from types import ModuleType

_started: list[str] = []  # folders from which the run was started, or resumed with other dials


def look_in(folders: Sequence[str]) -> None:
    """Find modules in these, too, behind all others: from there the run was started, or resumed with other dials."""
    _from_here()
    _started[:] = folders
    sys.path.extend(folder for folder in _started if os.path.isdir(folder) and folder not in sys.path)


def import_own(module: str) -> ModuleType:
    """The module; raises whatever it raises. Says on stderr if it is another than where the run was started."""
    _from_here()
    new = module not in sys.modules
    found = importlib.import_module(module)
    top = module.partition(".")[0]
    here = getattr(sys.modules[top], "__file__", None)
    for folder in _started if new and here else ():
        there = PathFinder.find_spec(top, [folder])
        if there is not None and there.origin and os.path.realpath(there.origin) != os.path.realpath(str(here)):
            print(f"warning: {top} is {here}, not {there.origin}, where the run was started", file=sys.stderr)
    return found


def looked_in() -> str:
    """Where modules are looked for, as errors say it."""
    if not _started:
        return "from the current folder or the Python path"
    told = [each if os.path.isdir(each) else f"{each}, which is no folder any more" for each in _started]
    return (
        f"from the current folder, the Python path or where the run was started ({'; '.join(told)}): start this in the "
        "folder that has it now, or name that folder in PYTHONPATH"
    )


def _from_here() -> None:
    """As `python -m` does; a console script does not."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
