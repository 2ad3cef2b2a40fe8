"""Runs and evaluations composed as the command line composes them, in a hundredth of the time.

Hydra composes what overrides choose of the groups once a process; the other overrides are put into a copy by the
function by which it puts them in itself.
"""

from __future__ import annotations

import copy
import functools
import sys

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlhf.compose import CONF, checked, checked_evaluation, register
from rlhf.config import EvaluationConfig, RunConfig

register()


def composed_run(*overrides: str) -> RunConfig:
    """The run that `python -m rlhf.train` makes of these words."""
    return checked(_composed("config", overrides))


def composed_evaluation(*overrides: str) -> EvaluationConfig:
    """The evaluation that `python -m rlhf.evaluate` makes of these words."""
    return checked_evaluation(_composed("evaluate", overrides))


@functools.cache
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig:
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if any(each.is_sweep_override() or each.is_hydra_override() for each in parsed):
        return _by_hydra(name, *overrides)
    config = copy.deepcopy(_by_hydra(name, *(each.input_line for each in parsed if _chooses(each))))
    try:
        ConfigLoaderImpl._apply_overrides_to_config([each for each in parsed if not _chooses(each)], config)
    except OmegaConfBaseException as error:
        raise ConfigCompositionException().with_traceback(sys.exc_info()[2]) from error
    return config


def _chooses(override: Override) -> bool:
    """Whether it names a choice of a group, as Hydra sees it."""
    return (CONF / override.key_or_group).is_dir() and not isinstance(override.value(), dict)


@functools.cache
def _by_hydra(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))
