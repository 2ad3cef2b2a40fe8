"""Where choices are found beside those of `conf/`: `--config-dir` and `hydra.searchpath`, as said or as noted by a run.

And from which folders a run was started, in which its modules may be.

Hydra's command line takes both; what composes without it is told here, as one override.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY = "hydra.searchpath"
FILE, PACKAGE = "file://", "pkg://"
OWN = ("hydra", "main", "schema")  # whose sources every run has
CWD = "hydra.runtime.cwd"  # where Hydra notes from which folder a run was started
RESUMED = "hydra.runtime.resumed_from"  # and we, from which others it was resumed with other dials
SOURCES = "hydra.runtime.config_sources"  # where Hydra notes all of them


@dataclass(frozen=True, slots=True)
class Where:
    """Sources beside `conf/`: `file://` with an absolute path, or `pkg://`."""

    sources: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)  # folders from which a run was started, which may have its modules

    def folders(self) -> list[Path]:
        """Those that are folders, not packages."""
        return [Path(source.removeprefix(FILE)) for source in self.sources if source.startswith(FILE)]

    def compose(self, name: str, overrides: Sequence[str], **options: Any) -> Any:
        """What Hydra, initialised, composes of the configuration of this name."""
        from hydra import compose

        quoted = ",".join('"' + source.replace('"', '\\"') + '"' for source in self.sources)
        path = [f"{KEY}=[{quoted}]"] if quoted else []
        return compose(name, [*path, *overrides], **options)


def of_command(arguments: Sequence[str]) -> tuple[Where, list[str]]:
    """What a command line names, and its overrides, without its flags."""
    from hydra._internal.utils import get_args_parser

    parsed = get_args_parser().parse_intermixed_args(list(arguments))
    said = [_list_of(override) for override in parsed.overrides]
    folder = [parsed.config_dir] if parsed.config_dir else []
    named = next((each for each in reversed(said) if each is not None), [])  # the last counts
    overrides = [override for override, each in zip(parsed.overrides, said, strict=True) if each is None]
    return Where([_absolute(each, Path.cwd()) for each in [*folder, *named]]), overrides


def noted(hydra: Path, given: Where) -> Where:
    """What is given now, and what Hydra has noted in `hydra`, its file of a run.

    ValueError names a folder that is gone, if none is given.
    """
    from omegaconf import OmegaConf

    if not hydra.is_file():
        return given
    told = OmegaConf.load(hydra)
    cwd = Path(OmegaConf.select(told, CWD) or ".")
    others: list[Any] = [each for each in OmegaConf.select(told, SOURCES) or [] if each["provider"] not in OWN]
    sources = [
        f"{PACKAGE}{each['path']}" if each["schema"] == "pkg" else _absolute(each["path"], cwd) for each in others
    ]
    gone = [str(folder) for folder in Where(sources).folders() if not folder.is_dir()]
    if gone and not given.sources:
        raise ValueError(
            f"the run found choices in {', '.join(gone)}, which is no folder any more: put it back, or say where it is "
            "now by --config-dir DIR"
        )
    there = [each for each in sources if each.removeprefix(FILE) not in gone]
    return Where(list(dict.fromkeys([*given.sources, *there])), started_in(hydra))


def started_in(hydra: Path) -> list[str]:
    """The folders from which the run was started, or resumed with other dials, as `hydra`, its file, notes them."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        told = OmegaConf.load(hydra)
        noted = [OmegaConf.select(told, CWD), *(OmegaConf.select(told, RESUMED) or [])]
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException):  # it may be anybody's
        return []
    return list(dict.fromkeys(str(each) for each in noted if each))


def note(told: Any, where: Where) -> None:
    """Let what Hydra has noted of a run name these, beside its own."""
    from omegaconf import OmegaConf

    own = [each for each in OmegaConf.select(told, SOURCES) or [] if each["provider"] in OWN]
    split = [source.split("://", 1) for source in where.sources]
    mine = [{"path": path, "schema": schema, "provider": "command-line"} for schema, path in split]
    OmegaConf.update(told, SOURCES, [*own, *mine], force_add=True)
    resumed = [each for each in [*where.started, os.getcwd()] if each != OmegaConf.select(told, CWD)]
    OmegaConf.update(told, RESUMED, list(dict.fromkeys(resumed)), force_add=True)


def _list_of(override: str) -> list[str] | None:
    """What an override says of `hydra.searchpath`; None of another one, or where it cannot be read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not override.startswith(f"{KEY}="):
        return None
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return None
    return [str(each) for each in value] if isinstance(value, list) else None


def _absolute(source: str, cwd: Path) -> str:
    if source.startswith(PACKAGE):
        return source
    return f"{FILE}{os.path.abspath(cwd / Path(source.removeprefix(FILE)).expanduser())}"
