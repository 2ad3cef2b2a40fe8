"""Composing a run with Hydra: the choices of each group, and one clear message for whatever is wrong with them.

The only file that knows Hydra's configuration: `register` puts every schema under `schema/`, where the files of `conf/`
pick it up, and `checked` turns what was composed into plain dataclasses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from rlhf.config import (
    EvaluationConfig,
    GivenModelConfig,
    HfModelConfig,
    HfRolloutConfig,
    RunConfig,
    TinyModelConfig,
    VllmRolloutConfig,
)
from rlhf.config.algo import AlgoConfig, DpoConfig
from rlhf.config.trainer import OneConfig, ReplicasConfig, ShardedConfig
from rlhf.plugins.found import use, warn
from rlhf.plugins.hydra_choices import register_parts
from rlhf.plugins.part import KINDS, PartError
from rlhf.plugins.registry import find_loaded, loaded, names
from rlhf.plugins.wanted import PLUGINS, wanted
from rlhf.shell.called import let_be_called
from rlhf.shell.own_modules import look_in
from rlhf.shell.search_path import Where, of_command
from transfer.config import (
    CollectiveConfig,
    DiskConfig,
    HandlesConfig,
    HttpSenderConfig,
    IpcConfig,
    LocalConfig,
    RaySenderConfig,
)

CONF = next(
    folder
    for folder in (Path(__file__).resolve().parent / "conf", Path(__file__).resolve().parent.parent / "conf")
    if folder.is_dir()
)  # inside the package in a wheel, beside it in a checkout

FIXED: dict[str, dict[str, type]] = {  # choices beside the parts of rlhf/plugins
    "model": {"tiny": TinyModelConfig, "hf": HfModelConfig, "given": GivenModelConfig},
    "rollout": {"hf": HfRolloutConfig, "vllm": VllmRolloutConfig},
    "algo": {"base": AlgoConfig, "dpo": DpoConfig},
    "transfer": {
        "ipc": IpcConfig,
        "gloo": CollectiveConfig,
        "nccl": CollectiveConfig,
        "disk": DiskConfig,
        "handles": HandlesConfig,
        "local": LocalConfig,
    },
    "trainer": {"one": OneConfig, "replicas": ReplicasConfig, "sharded": ShardedConfig},
    "transfer/sender": {"http": HttpSenderConfig, "ray": RaySenderConfig},
}
CONF_ONLY = Where()
CALLED = "rlhf.api.composed:compose"  # by `rlhf.compose(...)`


def schemas() -> dict[str, dict[str, type]]:
    """The dataclass of each choice of each group; of an installed package's, if it has been chosen."""
    found = {group: dict(choices) for group, choices in FIXED.items()}
    for part in loaded():
        if part.config is not None:
            found.setdefault(KINDS[part.kind].group, {})[part.name] = part.config
    return found


def others() -> dict[str, list[str]]:
    """The choices of each group, and the names that dials of an algorithm take, beside those of `conf/` and FIXED."""
    found: dict[str, list[str]] = {}
    ours = {(part.kind, part.name) for part in loaded() if part.ours}
    for kind, told in KINDS.items():
        more = [name for name in names(kind) if (kind, name) not in ours]
        if told.dial:
            found[told.dial] = names(kind)
            more = [name for name in more if (part := find_loaded(kind, name)) is None or part.config is not None]
        found.setdefault(told.group, []).extend(more)
    return {group: more for group, more in found.items() if more}


def choice(part: Any) -> str:
    """The name by which a group's choice is chosen: `ipc` of an IpcConfig; "in-process" of no sender at all."""
    if isinstance(part, CollectiveConfig):
        return part.library.value
    found = (name for choices in schemas().values() for name, schema in choices.items() if type(part) is schema)
    return next(found, "in-process")


def register() -> None:
    """Make every choice known to Hydra: `schema/<group>/<choice>`, and, if it is not ours, as the choice itself."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=RunConfig)
    store.store(group="schema", name="evaluation", node=EvaluationConfig)
    register_parts()
    for group, choices in FIXED.items():  # last, so that no part of that name takes their place
        for name, schema in choices.items():
            store.store(group=f"schema/{group}", name=name, node=schema)


def prepare(overrides: Sequence[str], where: Where = CONF_ONLY) -> None:
    """Import the modules that a command line's `plugins=[...]` names, or its experiments, and make their parts known.

    Where the jobs of a sweep have different ones, a name may be another part in each (plugins/in_sweeps.py).

    PartError says which is wrong, and what to change.
    """
    look_in(where.started)
    for modules in wanted(overrides, [CONF, *where.folders()]):
        use(modules)
        warn()
        for part in loaded():
            group = KINDS[part.kind].group
            taken = (CONF / group / f"{part.name}.yaml").is_file() or part.name in FIXED.get(group, {})
            if not part.ours and part.config is not None and taken:
                raise PartError(f"{part.where} registers {group}={part.name}, which conf/ has: give it another name")
        register()


def checked(config: Any) -> RunConfig:
    """Turn a composed run into plain, validated dataclasses; any mistake becomes one clear message."""
    run = _plain(config)
    assert isinstance(run, RunConfig)
    return run


def checked_evaluation(config: Any) -> EvaluationConfig:
    """The same for an evaluation of a saved policy."""
    evaluation = _plain(config)
    assert isinstance(evaluation, EvaluationConfig)
    return evaluation


def _plain(config: Any) -> Any:
    from hydra.errors import CompactHydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        use(OmegaConf.select(config, PLUGINS) or [])
        return OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise CompactHydraException(f"{error.full_key} has no value: add {error.full_key}=...") from None
    except (OmegaConfBaseException, AttributeError, ValueError) as error:  # slots: an unknown key is an AttributeError
        wrapped = isinstance(error, OmegaConfBaseException) and isinstance(error.__cause__, ValueError)
        raise CompactHydraException(str(error.__cause__ if wrapped else error)) from None


def unknown_choices(overrides: list[str]) -> list[str]:
    """For each `group=a,b` of a sweep, or `group=[a,b]`, that names what `conf/` has not: one line with what it has.

    Hydra says so in ten lines, or, of a list, not at all. With a search path of the user's own that is left to it.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if any("searchpath" in each or each.startswith(("--config-dir", "-cd")) for each in overrides):
        return []
    lines, more = [], others()
    for override in overrides:
        group = override.partition("=")[0].lstrip("+").partition("@")[0]
        if not {",", "["} & set(override) or not (CONF / group).is_dir():
            continue
        try:
            (parsed,) = OverridesParser.create().parse_overrides([override])
        except HydraException:
            continue
        there = sorted([*(path.stem for path in (CONF / group).glob("*.yaml")), *more.get(group, ())])
        if unknown := [name for name in _choices_of(parsed) if name not in (*there, "null")]:
            lines.append(f"{override}: there is no {group}={' or '.join(unknown)}; choose from {', '.join(there)}")
    return lines


def _choices_of(override: Any) -> list[str]:
    """What a sweep over choices, or a list of them, names; a sweep over lists names what they hold."""
    if override.is_choice_sweep():
        values = [each.strip("[]").split(",") for each in override.sweep_string_iterator()]
        return [name.strip() for names in values for name in names if name.strip()]
    value = None if override.is_sweep_override() else override.value()
    return [str(name) for name in value] if isinstance(value, list) else []


def misplaced(overrides: list[str]) -> list[str]:
    """For `group.key=...` overrides whose key only other choices of that group have: one line each that says so.

    And for values that begin with #, which Hydra takes in quotes alone.
    """
    cut = [override.partition("=") for override in overrides if override.partition("=")[2].startswith("#")]
    hints = [f"a value that begins with # needs quotes of its own: \"{key}='{value}'\"" for key, _, value in cut]
    chosen, known = _chosen(overrides), schemas()
    for override in overrides:
        path, _, key = override.partition("=")[0].lstrip("+~").rpartition(".")
        group = path.replace(".", "/")
        owners = [name for name, schema in known.get(group, {}).items() if key in _keys(schema)]
        if owners and group in chosen and key not in _keys(chosen[group]):
            kind = group.rpartition("/")[2]
            owners = [file for name in owners for file in _files(group, name)]
            hints.append(
                f"that key belongs to the {' or '.join(owners)} {kind}: {path}.{key} needs {group}={owners[0]}"
            )
    return hints


def _files(group: str, schema: str) -> list[str]:
    """The choices by which a schema is had: its namesake, or all that build on it."""
    if (CONF / group / f"{schema}.yaml").exists() or schema in others().get(group, ()):
        return [schema]
    files = sorted((CONF / group).glob("*.yaml"))
    return [file.stem for file in files if f"/schema/{group}/{schema}@" in file.read_text(encoding="utf-8")]


def _chosen(overrides: list[str]) -> dict[str, Any]:
    """The schema chosen for each group when only the choices among `overrides` are composed."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    where, words = of_command(overrides)
    groups = schemas()
    choices = [o for o in words if o.partition("=")[0] in {*groups, "experiment"} and "," not in o]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = where.compose("config", choices)
    except Exception:  # the mistake is in a choice itself, and Hydra has said so already
        return {}
    nodes = {group: OmegaConf.select(config, group.replace("/", ".")) for group in groups}
    return {group: OmegaConf.get_type(node) for group, node in nodes.items() if node is not None}


def _keys(schema: Any) -> set[str]:
    return {f.name for f in fields(schema)} if is_dataclass(schema) else set()


let_be_called(__name__)
