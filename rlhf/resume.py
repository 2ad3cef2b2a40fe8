"""The command line that goes on with a run that was stopped: its own configuration, from its newest checkpoint.

Imports nothing heavy before the configuration is checked.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from rlhf import __version__
from rlhf.beside import started_by_torchrun
from rlhf.checkpoint.resumable import resumable
from rlhf.checkpoint.store import FOLDER, Store
from rlhf.compose import CONF, checked, prepare
from rlhf.config import Mode, RunConfig
from rlhf.config.model import AUTO
from rlhf.preflight.before_torch import look
from rlhf.shell.dials import replace, saved, taken_back
from rlhf.shell.ending import EXPLAINED, RunError, alone, check_free, full_disk_explained
from rlhf.shell.going_on import given_to, goes_on_by
from rlhf.shell.own_modules import look_in
from rlhf.shell.screen import outlast
from rlhf.shell.search_path import Where, note, noted, of_command
from transfer.agreement.shown import printable

HELP = """\
Go on with a run that was stopped, from its newest checkpoint that verifies (docs/operations.md).

  python -m rlhf.resume RUN_DIR                 what is missing, as if the run had never been stopped
  python -m rlhf.resume RUN_DIR steps=200       with other dials from here on; each is named

Choices of your own (--config-dir, hydra.searchpath) are looked for where the run had them; --config-dir DIR says where
they are now. Modules of your own (plugins, reward.function) are found in the folder that the run was started in, too.
"""
MOST = 8  # keys that a message names
NOWHERE = Where()  # but in conf/
GONE, MISSING = "gone", "???"  # a key that is not there; a default that a schema leaves to a choice
HYDRA, CHOICES = "hydra.yaml", "hydra.runtime.choices"  # a file beside the configuration, and what it says there


def main() -> None:
    """`python -m rlhf.resume RUN_DIR [overrides]`."""
    from hydra.errors import HydraException

    from rlhf.train import as_command

    outlast()
    if "--version" in sys.argv[1:]:  # Hydra would say its own
        print(f"rlhf {__version__}")
        return
    if started_by_torchrun():
        return
    asked = bool({"--help", "-h"} & set(sys.argv[1:]))
    where, words = (Where(), []) if asked else of_command(sys.argv[1:])
    if not words or ("=" in words[0] and not Path(words[0]).is_dir()):
        print(HELP)
        sys.exit(0 if asked else 2)
    folder, overrides = Path(words[0]), words[1:]
    hinted = list(overrides)
    with as_command(hinted):
        try:
            with full_disk_explained(folder), taken_back(folder):
                config, replayed = composed(folder, overrides, where)
                hinted[:] = replayed  # a key may belong to what the run has chosen
                if finished(folder, replayed):
                    print(f"finished already: {folder}")
                    return
                _check_goes_on(folder, config)
                with resumable(Store(folder / FOLDER)):
                    seen = look(config)
                from rlhf.run import run

                run(config, folder, replayed, resume=True, seen=seen)
        except (HydraException, *EXPLAINED) as error:
            print(printable(_with_cause(error)), file=sys.stderr)
            sys.exit(1)


def _with_cause(error: Exception) -> str:
    """Hydra's errors say which override is wrong; why is said by what they were raised from."""
    cause = str(error.__cause__ or "").strip().partition("\n")[0]
    return f"{error}: {cause}" if cause and cause not in str(error) and not isinstance(error, EXPLAINED) else str(error)


def composed(folder: Path, overrides: Sequence[str], given: Where = NOWHERE) -> tuple[RunConfig, list[str]]:
    """The run's configuration with these overrides behind its own, and all of them; `.hydra/` then says the same.

    Its choices are looked for where is `given`, and where they were.

    ValueError names the keys and choices that differ from what the run was started with, if these overrides are not
    why; a key that there was not, and that has its default, is only said.
    """
    from omegaconf import OmegaConf

    if (objects := given_to(folder)) is not None:
        gave = f", which gave it {', '.join(objects)}" if objects else ""
        raise ValueError(f"{folder} is the run of a Python program{gave}: go on there, with {goes_on_by(folder)}")
    first = [str(each) for each in OmegaConf.load(_hydra(folder) / "overrides.yaml")]
    began, chosen = OmegaConf.to_container(OmegaConf.load(_hydra(folder) / "config.yaml")), _chosen(folder, first)
    where = noted(_hydra(folder) / HYDRA, given)
    config, choices = _compose([*first, *overrides], where)
    plain, chosen_now = _compose(first, where) if overrides else (config, choices)
    chosen = {group: name for group, name in chosen.items() if group in choices}  # those of a new group are its keys
    now = _leaves(_plain(config)) | {group: choices[group] for group in chosen}
    without = _leaves(_plain(plain)) | {group: chosen_now[group] for group in chosen if group in chosen_now}
    before = {key: value for key, value in _leaves(began).items() if value != {} or not _filled(key, now)} | chosen
    told = {override.partition("=")[0].lstrip("+~") for override in overrides}
    differ = [key for key in sorted(before.keys() | now.keys()) if before.get(key, GONE) != now.get(key, GONE)]
    others = [key for key in differ if now.get(key, GONE) == without.get(key, GONE) and key not in told]
    others = [key for key in others if not _chooses(key, before.get(key), config)]
    new = [key for key in others if _is_new(key, began, config)]
    if changed := [key for key in others if key not in new]:
        raise ValueError(
            f"{folder} was started with other dials than its overrides compose now: {_named(changed, before, now)}; "
            "say by overrides which you want, or go on with the conf/ and rlhf/ that it was started with"
        )
    look_in(where.started)  # which composing something else may have changed
    run = checked(config)
    if run.mode is not Mode.train:
        raise ValueError(f"a run that was begun needs no check: leave out mode={run.mode.value}")
    if overrides or new or given.sources:
        with alone(folder):
            _note(_hydra(folder), (config, choices), [*first, *overrides], where)
    if new:
        print(f"new since the run began: {_listed([f'{key}={now[key]}' for key in new])}")
    if overrides:
        dials = [key for key in differ if key not in new]
        print(f"other dials from here on: {_named(dials, before, now) or 'none'}")
    return run, [*first, *overrides]


def finished(folder: Path, overrides: Sequence[str]) -> bool:
    """Whether a run with these overrides has ended here."""
    from rlhf.reports.summary import read_summary

    summary = read_summary(folder)
    return summary.get("status") == "finished" and summary.get("overrides") == list(overrides)


def _check_goes_on(folder: Path, config: RunConfig) -> None:
    """RunError if another process trains there, or if even the oldest checkpoint is beyond the run's last step."""
    check_free(folder)
    steps = [int(name) for name in saved(folder) if name.isdigit()]
    if steps and min(steps) > config.steps:
        raise RunError(f"step {max(steps)} is done already: steps must be at least that (got {config.steps})")


def _hydra(folder: Path) -> Path:
    for name in ("overrides.yaml", "config.yaml"):
        if not (folder / ".hydra" / name).is_file():
            raise ValueError(f"{folder} is no folder of a run: it has no .hydra/{name}")
    return folder / ".hydra"


def _compose(overrides: Sequence[str], where: Where = NOWHERE) -> tuple[Any, dict[str, Any]]:
    """What they compose, and the choice of each group: neither Hydra's own nor the experiment, which is its keys."""
    from hydra import initialize_config_dir
    from omegaconf import open_dict

    prepare(overrides, where)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = where.compose("config", overrides, return_hydra_config=True)
    choices = config.hydra.runtime.choices
    with open_dict(config):
        del config["hydra"]
    return config, {group: name for group, name in choices.items() if group.partition("/")[0] in config}


def _chosen(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The choice of each group that the run was started, or last resumed, with; of one of its overrides, the last."""
    from omegaconf import OmegaConf

    path = _hydra(folder) / HYDRA
    known = OmegaConf.select(OmegaConf.load(path), CHOICES) if path.is_file() else None
    said = {key: choice for key, _, choice in (each.partition("=") for each in overrides)}
    return {} if known is None else {group: said.get(group, name) for group, name in known.items()}


def _filled(group: str, leaves: Mapping[str, Any]) -> bool:
    """Whether an empty group has keys there."""
    return any(key.startswith(f"{group}.") for key in leaves)


def _is_new(key: str, before: Any, config: Any) -> bool:
    """Whether there was no such key, while there was the mapping above it, and it has its default."""
    names = key.split(".")
    for depth, name in enumerate(names):
        if not isinstance(before, Mapping):
            return False
        if name not in before:
            path = names[: depth + 1]
            return _at(_plain(config), path) == _default(config, path) != GONE
        before = before[name]
    return False


def _chooses(key: str, before: Any, config: Any) -> bool:
    """Whether what is now left to the run (`auto`) is what the key said before."""
    from hydra.errors import CompactHydraException

    names = key.split(".")
    if _at(_plain(config), names) != AUTO or before is None:
        return False
    try:
        found: Any = functools.reduce(getattr, names, checked(config))
    except (CompactHydraException, AttributeError):  # which is told later
        return False
    return bool(getattr(found, "value", found) == before)


def _default(config: Any, path: Sequence[str]) -> Any:
    """What the schema gives a key, or, where that is a group's, what the default run has; GONE if neither does."""
    from omegaconf import OmegaConf

    schema = OmegaConf.get_type(_at(config, path[:-1]))
    default = _plain(OmegaConf.structured(schema)).get(path[-1], GONE) if is_dataclass(schema) else GONE
    return _at(_default_run(), path) if default == MISSING else default


@functools.cache
def _default_run() -> Any:
    return _plain(_compose([])[0])


def _at(config: Any, path: Sequence[str]) -> Any:
    """The node there; GONE where there is none."""
    for name in path:
        config = config[name] if isinstance(config, Mapping) and name in config else GONE
    return config


def _plain(config: Any) -> Any:
    """As it would come back from a file, without types."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(config)))


def _leaves(node: Any, path: str = "") -> dict[str, Any]:
    """Every value by its dotted key; an empty group is a value, too."""
    if not isinstance(node, Mapping) or not node:
        return {path: node}
    leaves: dict[str, Any] = {}
    for name, child in node.items():
        leaves |= _leaves(child, f"{path}.{name!s}".lstrip("."))
    return leaves


def _named(keys: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return _listed([f"{key} is {now.get(key, GONE)} (was {before.get(key, 'not there')})" for key in keys])


def _listed(shown: Sequence[str]) -> str:
    return ", ".join([*shown[:MOST], *([f"and {len(shown) - MOST} more"] if len(shown) > MOST else [])])


def _note(hydra: Path, made: tuple[Any, Mapping[str, Any]], overrides: Sequence[str], where: Where) -> None:
    """What the run has from here on, where Hydra notes it."""
    from omegaconf import OmegaConf

    config, choices = made
    replace(hydra / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(list(overrides))))
    replace(hydra / "config.yaml", OmegaConf.to_yaml(config))
    if (hydra / HYDRA).is_file():
        told = OmegaConf.load(hydra / HYDRA)
        OmegaConf.select(told, CHOICES).update(choices)
        note(told, where)
        replace(hydra / HYDRA, OmegaConf.to_yaml(told))


if __name__ == "__main__":
    main()
