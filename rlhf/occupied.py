"""What must not be written over: a folder in which a run trains, and a sweep's finished jobs of other choices.

Whoever would do so is refused before Hydra writes its own files there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from rlhf.reports.run_folder import runs_below
from rlhf.reports.summary import read_summary
from rlhf.shell.ending import RunError, check_free

NUMBERED = "${hydra.job.num}"  # Hydra's default name of a job's folder


class Occupied(Callback):
    """Ends the program, with one line, if another one trains where it would write: `.hydra/` is the other's."""

    def on_run_start(self, config: Any, **kwargs: Any) -> None:
        """One run."""
        if config.hydra.output_subdir is not None:  # else Hydra writes nothing
            folder = Path(config.hydra.run.dir)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                sys.exit(f"{folder} cannot be made ({error.strerror}): choose another hydra.run.dir=...")
            _end_if_busy(folder)

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """A sweep: any of its jobs."""
        sweep = Path(config.hydra.sweep.dir)
        for begun in runs_below(sweep):
            _end_if_busy(begun)
        for folder, job in _jobs(config, sweep):
            summary = read_summary(folder)
            done = summary.get("overrides", [])
            if summary.get("status") == "finished" and done != job:
                sys.exit(
                    f"{folder} holds a finished job with {_others(done, job)}, where this sweep would have one with "
                    f"{_others(job, done)}: choose another hydra.sweep.dir=..., or remove that folder first"
                )


def _jobs(config: Any, sweep: Path) -> Iterator[tuple[Path, list[str]]]:
    """Where each job of Hydra's own sweeper will write, and its overrides; none with folders of the user's choice."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    hydra: Any = OmegaConf.to_container(config.hydra, resolve=False)
    if not str(hydra["sweeper"]["_target_"]).endswith("BasicSweeper") or hydra["sweep"]["subdir"] != NUMBERED:
        return
    of_file = [f"{key}={choices}" for key, choices in (hydra["sweeper"]["params"] or {}).items()]
    given = OverridesParser.create().parse_overrides([*of_file, *config.hydra.overrides.task])
    for number, job in enumerate(BasicSweeper.split_arguments(given, None)[0]):
        yield sweep / str(number), job


def _others(these: Sequence[str], those: Sequence[str]) -> str:
    return " ".join(each for each in these if each not in those) or "fewer overrides"


def _end_if_busy(folder: Path) -> None:
    try:
        check_free(folder)
    except RunError as error:
        sys.exit(str(error))  # Hydra turns any other exception of a callback into a warning
