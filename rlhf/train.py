"""The command line: compose a run from `conf/` and overrides, check it, train. Imports nothing heavy before that."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode

from rlhf import __version__
from rlhf.beside import started_by_torchrun
from rlhf.compose import CONF, checked, misplaced, others, prepare, register, unknown_choices
from rlhf.config import Mode, RunConfig
from rlhf.plugins import PartError
from rlhf.preflight.before_torch import look
from rlhf.shell.called import let_be_called
from rlhf.shell.ending import (
    EXPLAINED,
    INTERRUPTED,
    RESUMABLE,
    STOPPED,
    check_free,
    explained,
    full_disk_explained,
    terminate_as_interrupt,
)
from rlhf.shell.screen import outlast
from rlhf.shell.search_path import of_command
from transfer.agreement.shown import printable

register()

CALLED = "rlhf.api.trained:train"  # by `rlhf.train(...)`
RUN_DIR = "hydra.run.dir="
NOWHERE = (f"{RUN_DIR}.", "hydra.output_subdir=null", "hydra.mode=RUN")

HELP = """\
RLHF: sample, score, learn, hand the new weights over; repeat.

  python -m rlhf.train                                  the default run: SFT, reward model, GRPO; a minute or two
  python -m rlhf.train algo=rloo task=reverse           swap parts (group=choice); key=value changes one dial
  python -m rlhf.train mode=check algo=ppo              before a run: validate, estimate memory, make one step
  python -m rlhf.train -m transfer=ipc,disk seed=0,1    a sweep: every combination, one table
  python -m rlhf.train plugins=[my_parts] task=mine     parts of your own, from my_parts.py (docs/configuration.md)
  python -m rlhf.train --cfg job                        print the composed run and stop

Afterwards (each has a --help of its own; RUN_DIR is the folder that a run names at its end):

  python -m rlhf.resume RUN_DIR                         go on with a run that was stopped
  python -m rlhf.report RUN_DIR [ANOTHER ...]           one HTML page: curves, alarms, time, samples; runs compared
  python -m rlhf.sweep SWEEP_DIR                        a sweep's tables and plot again
  python -m rlhf.evaluate model.path=RUN_DIR/policy     a saved policy alone: greedy accuracy, gold score, pass@k

python -m transfer.doctor says what works on this machine, and --hydra-help lists Hydra's own flags.

Choices (group=choice, and what algo.loss and algo.advantage may name):
{choices}

The dials of the composed run (key=value; what each means is in rlhf/config/ and transfer/config.py):

{dials}"""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _job(config: Any) -> float | None:
    """Train; in a sweep, what the job is judged by, for sweepers that look for good dials."""
    run_config = checked(config)
    overrides = list(HydraConfig.get().overrides.task)
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        if HydraConfig.get().mode is RunMode.MULTIRUN and run_config.mode is not Mode.check:
            from rlhf.sweep import run_job

            with full_disk_explained(folder):
                return run_job(run_config, folder, overrides, Path(HydraConfig.get().sweep.dir))
        if run_config.mode is Mode.check:
            _check(run_config, *_checked_folder(folder))
            return None
        check_free(folder)  # before large data are read
        seen = look(run_config)
        from rlhf.run import run

        run(run_config, folder, overrides, seen=seen)
    except EXPLAINED as error:
        raise CompactHydraException(printable(str(error))) from error
    return None


def _check(config: RunConfig, folder: Path, told: str) -> None:
    """What a check of a run into `folder`, in messages `told`, can find without torch; then the rest of it."""
    check_free(folder)
    with explained(lambda: "the check failed (task and reward)"):
        seen = look(config)
    from rlhf.check import check_run

    check_run(config, folder, told, seen)


def _checked_folder(folder: Path) -> tuple[Path, str]:
    """Where a run with the same line would write, for a check, which has no folder; and how to say so."""
    given = [o.partition("=")[2] for o in HydraConfig.get().overrides.hydra if o.startswith(RUN_DIR)]
    if given[-1:] != ["."]:
        return folder, str(folder)
    return (Path(given[-2]), given[-2]) if given[:-1] else (Path("outputs"), "outputs/DATE/TIME")


def for_check(arguments: list[str]) -> list[str]:
    """The command line, so that Hydra writes nothing if it is one of a check; SystemExit for a check of a sweep."""
    modes = [argument for argument in arguments if argument.lstrip("+").partition("=")[0] == "mode"]
    if not modes or modes[-1].partition("=")[2] != Mode.check.value:
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        sys.exit("mode=check looks at one run: leave out -m, and give one choice for each that the sweep tries")
    last = max(n for n, each in enumerate(arguments) if each in modes or each.startswith(RUN_DIR))
    return [*arguments[: last + 1], *NOWHERE, *arguments[last + 1 :]]


def main() -> None:
    """Console script `rlhf-train`, and `python -m rlhf.train`."""
    outlast()
    if answered(sys.argv[1:]) or started_by_torchrun():
        return
    prepare_command(sys.argv[1:])
    if unknown := unknown_choices(sys.argv[1:]):
        sys.exit("\n".join(unknown))
    sys.argv[1:] = for_check(sys.argv[1:])
    with as_command(sys.argv[1:]):
        _job()


def prepare_command(arguments: list[str], started: Sequence[str] = ()) -> None:
    """Let the parts be known that a command line names; SystemExit with what is wrong with them.

    `started`: folders that may have its modules, too.
    """
    where, overrides = of_command(arguments)
    try:
        prepare(overrides, replace(where, started=list(started)))
    except PartError as error:
        sys.exit(printable(str(error)))


@contextmanager
def as_command(overrides: list[str]) -> Iterator[None]:
    """What training means to a shell: signals end it in order, exit codes tell how, and hints follow a mistake."""
    terminate_as_interrupt()
    outlast()
    try:
        yield
    except KeyboardInterrupt:
        _say_stopped("interrupted")
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if end.code in (*STOPPED, RESUMABLE):
            _say_stopped("terminated")
        elif end.code:
            for hint in misplaced(overrides):
                print(hint, file=sys.stderr)
        raise


def _say_stopped(how: str) -> None:
    print(f"{how}: workers and shared memory are released", file=sys.stderr)


def answered(arguments: list[str], name: str = "config", text: str = HELP) -> bool:
    """Whether help or the version was asked for, and has been printed; Hydra's own of both are of Hydra."""
    if {"--help", "-h"} & set(arguments):
        print_help(arguments, name, text)
    elif "--version" in arguments:
        print(f"rlhf {__version__}")
    else:
        return False
    return True


def print_help(arguments: list[str], name: str = "config", text: str = HELP) -> None:
    """What can be chosen, and what a command line composes of `name`; Hydra's own help takes seconds for as much."""
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    prepare_command(arguments)
    where, overrides = of_command(arguments)
    choices: dict[str, list[str]] = {}
    for path in sorted(
        path.relative_to(place) for place in (CONF, *where.folders()) for path in place.glob("*/**/*.yaml")
    ):
        choices.setdefault(path.parent.as_posix(), []).append(path.stem)
    for group, more in others().items():
        choices.setdefault(group, []).extend(name for name in more if name not in choices.get(group, ()))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            composed = where.compose(name, overrides)
        except HydraException as error:
            sys.exit(str(error))
    shown = [
        group
        for group in sorted(choices)
        if group.partition("/")[0].partition(".")[0] in composed or (name, group) == ("config", "experiment")
    ]
    lines = [f"  {group:<16} {' '.join(choices[group])}" for group in shown]
    print(text.format(choices="\n".join(lines), dials=OmegaConf.to_yaml(composed)))


let_be_called(__name__)

if __name__ == "__main__":
    main()
