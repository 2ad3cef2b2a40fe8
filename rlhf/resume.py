"""The command line that goes on with a run that was stopped: its own configuration, from its newest checkpoint.

Imports nothing heavy before the configuration is checked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.compose import CONF, checked, register
from rlhf.config import Mode, RunConfig
from rlhf.ending import EXPLAINED, alone

HELP = """\
Go on with a run that was stopped, from its newest checkpoint that verifies (docs/operations.md).

  python -m rlhf.resume RUN_DIR                 what is missing, as if the run had never been stopped
  python -m rlhf.resume RUN_DIR steps=200       with other dials from here on; each is named
"""
MOST = 8  # keys that a message names


def main() -> None:
    """`python -m rlhf.resume RUN_DIR [overrides]`."""
    from hydra.errors import HydraException

    from rlhf.train import as_command

    arguments = sys.argv[1:]
    if not arguments or {"--help", "-h"} & set(arguments) or "=" in arguments[0]:
        print(HELP)
        sys.exit(0 if {"--help", "-h"} & set(arguments) else 2)
    folder, overrides = Path(arguments[0]), arguments[1:]
    with as_command(overrides):
        try:
            config, replayed = composed(folder, overrides)
            if finished(folder, replayed):
                print(f"finished already: {folder}")
                return
            from rlhf.run import run

            run(config, folder, replayed, resume=True)
        except (HydraException, *EXPLAINED) as error:
            print(error, file=sys.stderr)
            sys.exit(1)


def composed(folder: Path, overrides: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """The run's configuration with these overrides behind its own, and all of them; `.hydra/` then says the same.

    ValueError names the keys that differ from what the run was started with, if these overrides are not why.
    """
    from omegaconf import OmegaConf

    first = [str(each) for each in OmegaConf.load(_hydra(folder) / "overrides.yaml")]
    before = _leaves(OmegaConf.load(_hydra(folder) / "config.yaml"))
    config = _compose([*first, *overrides])
    now, without = _leaves(_reread(config)), _leaves(_reread(_compose(first)))
    given = {override.partition("=")[0].lstrip("+~") for override in overrides}
    differ = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    others = [key for key in differ if now.get(key) == without.get(key) and key not in given]
    if others:
        raise ValueError(
            f"{folder} was started with other dials than its overrides compose now: {_named(others, before, now)}; say "
            "by overrides which you want, or go on with the conf/ and rlhf/ that it was started with"
        )
    run = checked(config)
    if run.mode is not Mode.train:
        raise ValueError(f"a run that was begun needs no check: leave out mode={run.mode.value}")
    if overrides:
        with alone(folder):
            _replace(_hydra(folder) / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create([*first, *overrides])))
            _replace(_hydra(folder) / "config.yaml", OmegaConf.to_yaml(config))
        print(f"other dials from here on: {_named(differ, before, now) or 'none'}")
    return run, [*first, *overrides]


def finished(folder: Path, overrides: Sequence[str]) -> bool:
    """Whether a run with these overrides has ended here."""
    from rlhf.reports.summary import read_summary

    summary = read_summary(folder)
    return summary.get("status") == "finished" and summary.get("overrides") == list(overrides)


def _hydra(folder: Path) -> Path:
    if not (folder / ".hydra" / "overrides.yaml").is_file():
        raise ValueError(f"{folder} is no folder of a run: it has no .hydra/overrides.yaml")
    return folder / ".hydra"


def _compose(overrides: Sequence[str]) -> Any:
    from hydra import compose, initialize_config_dir

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def _reread(config: Any) -> Any:
    """As it would come back from a file."""
    from omegaconf import OmegaConf

    return OmegaConf.create(OmegaConf.to_yaml(config))


def _leaves(config: Any, path: str = "") -> dict[str, Any]:
    """Every value by its dotted key; an empty group is a value, too."""
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(config) if OmegaConf.is_config(config) else config
    if not isinstance(node, Mapping) or not node:
        return {path: node}
    leaves: dict[str, Any] = {}
    for name, child in node.items():
        leaves |= _leaves(child, f"{path}.{name!s}".lstrip("."))
    return leaves


def _named(keys: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    shown = [f"{key} is {now.get(key, 'gone')} (was {before.get(key, 'not there')})" for key in keys[:MOST]]
    return ", ".join([*shown, *([f"and {len(keys) - MOST} more"] if len(keys) > MOST else [])])


def _replace(path: Path, text: str) -> None:
    writing = path.with_suffix(".writing")
    writing.write_text(text)
    os.replace(writing, path)


if __name__ == "__main__":
    main()
