"""`rlhf.train`: the run of a configuration in this process, with objects of a Python program's own."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.api.around import alone_in_process, as_it_was
from rlhf.api.composed import compose
from rlhf.api.fitting import fitted, named
from rlhf.api.noted import note, told_of
from rlhf.api.result import Result
from rlhf.config import Mode, RunConfig
from rlhf.preflight.before_torch import look
from rlhf.preflight.objects import Objects
from rlhf.ranks.place import Place, place_of
from rlhf.reports.summary import read_summary
from rlhf.shell.dials import taken_back
from rlhf.shell.ending import check_free
from rlhf.shell.going_on import given_to, goes_on_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Rows = Iterable[Mapping[str, Any]] | str | os.PathLike[str]
    Rewards = Callable[..., Any] | Sequence[Callable[..., Any]] | Mapping[Callable[..., Any], float]


def train(  # noqa: PLR0913 - named by who calls it
    config: RunConfig | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    policy: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Rows | None = None,
    held_out: Rows | None = None,
    rewards: Rewards | None = None,
    resume: bool = False,
) -> Result:
    """Run a configuration, as `python -m rlhf.train` does, and return what it has left (docs/python.md).

        config = rlhf.compose(["experiment=smoke", "steps=5"])
        result = rlhf.train(config, policy=model, tokenizer=tokenizer, data=rows, rewards=brevity)

    What is left out is what the configuration says; without one, it is the default run's.

    folder      where the run writes, outputs/DATE/TIME by default; an earlier run there is removed, as by the command
    policy      a causal LM of transformers, whose weights are where training begins; trained in place, and moved to
                model.device
    tokenizer   its tokenizer, which stays as it is; by default that of the folder or name the policy was loaded from
    data        rows to train on, in the forms of rlhf/tasks/jsonl.py: dicts, a datasets.Dataset, or a path
    held_out    rows to evaluate on, in the same forms; by default task.held_out prompts of `data`
    rewards     a function of prompts and completions, in the forms of rlhf/rewards/calling.py, a list of them, which
                are added up, or a dict {function: weight}; called in this process, each call with reward.timeout_s
    resume      go on from the folder's newest checkpoint, with the same arguments; begin where there is none

    ValueError and rlhf.RunError say in one line what is wrong. Ctrl-C, a notebook's stop, is a KeyboardInterrupt that
    ends all processes of the run and saves where it was. Afterwards threads, seeds and signals are as they were.
    """
    where = _folder(folder, resume)
    config = compose() if config is None else copy.deepcopy(_checked(config))
    functions, weights = named(rewards)
    objects = Objects(policy, tokenizer, data, held_out, functions)
    config = fitted(config, objects, isinstance(rewards, (Sequence, Mapping)), weights)
    place = _place(config, objects)
    with ExitStack() as stack:
        stack.enter_context(alone_in_process())
        stack.enter_context(as_it_was())
        check_free(where)
        if resume and _is_done(where, config):
            return _done(where, policy)
        _run(config, where, objects, resume, place)
    return Result(where, policy)


def _run(config: RunConfig, folder: Path, objects: Objects, resume: bool, place: Place) -> None:
    from rlhf.models.given import borrowed
    from rlhf.run import run

    with borrowed(objects.policy), taken_back(folder) if resume else nullcontext():
        seen = look(config, objects)
        note(config, folder, objects, resume)
        run(config, folder, resume=resume, seen=seen, place=place)


def _folder(given: str | os.PathLike[str] | None, resume: bool) -> Path:
    """Where the run writes; ValueError where it cannot go on there."""
    if given is None:
        if resume:
            raise ValueError("resume=True goes on in a folder: say which by folder=...")
        return Path(datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S.%f"))
    folder = Path(given).expanduser()
    if resume and (folder / ".hydra" / "overrides.yaml").is_file() and given_to(folder) is None:
        raise ValueError(f"{folder} is the run of a command line: go on with {goes_on_by(folder)}")
    return folder


def _checked(config: RunConfig) -> RunConfig:
    if not isinstance(config, RunConfig):
        raise ValueError(f"config= must be what rlhf.compose(...) returns (got {type(config).__name__})")
    if config.mode is not Mode.train:
        raise ValueError(f"mode={config.mode.value} is the command line's: leave it out, or use python -m rlhf.train")
    return config


def _place(config: RunConfig, objects: Objects) -> Place:
    """The first rank's; ValueError where other processes would need what only this one has."""
    place = place_of(config.trainer, config.model)
    if place.torchrun and place.count > 1:
        raise ValueError("torchrun starts ranks of python -m rlhf.train, not a Python program's: start this without it")
    if place.count == 1:
        return place
    if there := told_of(objects):
        raise ValueError(
            f"{there} are of this process, and the trainer would be {place.count}: set trainer=one, or name a model, "
            "data and functions by the configuration"
        )
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(
            f"a trainer of {place.count} processes needs the main thread: set trainer=one, or call it there"
        )
    return place


def _is_done(folder: Path, config: RunConfig) -> bool:
    summary = read_summary(folder)
    return summary.get("status") == "finished" and summary.get("steps", 0) >= config.steps


def _done(folder: Path, policy: PreTrainedModel | None) -> Result:
    """A run that has ended already; the policy that is given gets its weights."""
    from rlhf.models.policy import reload

    print(f"finished already: {folder}")
    result = Result(folder, policy)
    if policy is not None:
        reload(policy, result.policy_folder)
    return result
