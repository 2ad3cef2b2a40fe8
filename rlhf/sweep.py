"""Sweeps: each job in a process of its own, finished jobs skipped, and tables that are rewritten after every job."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode

from rlhf.config import Objective, RunConfig
from rlhf.plugins.found import use
from rlhf.preflight.before_torch import look
from rlhf.reports.leaderboard import write_tables
from rlhf.reports.run_folder import runs_below
from rlhf.reports.summary import objective_of, read_summary, write_summary
from rlhf.shell.ending import (
    EXPLAINED,
    RESUMABLE,
    STOPPED,
    STOPS,
    RunError,
    check_free,
    end_with_parent,
    terminate_as_interrupt,
)
from rlhf.shell.screen import outlast
from transfer.agreement.shown import printable

END_S = 30.0  # how long an interrupted job may take to end by itself


def run_job(config: RunConfig, folder: Path, overrides: Sequence[str], sweep: Path) -> float | None:
    """Train in a fresh process, unless this folder holds the finished job already; RunError if the job dies.

    Returns the job's objective: what a sweeper that looks for good dials is told.
    """
    summary = read_summary(folder)
    if summary.get("status") == "finished" and summary.get("overrides") == list(overrides):
        print(f"finished already, skipped: {folder}")
        return _objective(summary, config)
    check_free(folder)  # before what it holds is removed, and before large data are read
    go_on = summary.get("status", "interrupted") == "interrupted"  # one without a summary was killed
    (folder / "summary.json").unlink(missing_ok=True)
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method("spawn", force=True)  # joblib's own, which a fresh process does not know
    arguments = (config, folder, list(overrides), go_on)
    process = multiprocessing.get_context("spawn").Process(target=_child, args=arguments)
    process.start()
    try:
        process.join()
    finally:
        if process.is_alive():  # this process was interrupted
            process.terminate()
            process.join(END_S)
            process.kill()
            write_summary(folder, "interrupted", overrides, {})
            write_tables(sweep)  # Hydra does not call on_job_end now
    if process.exitcode:
        if process.exitcode in (*STOPPED, RESUMABLE, *(-each for each in STOPS)):  # it alone was: the sweep goes on
            write_summary(folder, "interrupted", overrides, {"error": "the job's process was told to end by a signal"})
        raise RunError(read_summary(folder).get("error", f"the process died with exit code {process.exitcode}"))
    return _objective(read_summary(folder), config)


def _objective(summary: dict[str, Any], config: RunConfig) -> float | None:
    value = objective_of(summary, config.objective)
    if value is None and config.objective is not None:
        raise RunError(
            f"objective={config.objective.value} was not measured in this run: "
            "choose another, or a task or algo that has it"
        )
    return value


def _child(config: RunConfig, folder: Path, overrides: list[str], go_on: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the parent, which then ends this
    terminate_as_interrupt()
    outlast()
    end_with_parent()
    try:
        use(config.plugins)
        seen = look(config)
        from rlhf.run import run

        run(config, folder, overrides, resume=go_on and _begun(folder, config), seen=seen)
    except EXPLAINED as error:
        _note_failure(folder, overrides, str(error))
        sys.exit(1)
    except Exception as error:
        _note_failure(folder, overrides, f"{type(error).__name__}: {error}")
        raise


def _note_failure(folder: Path, overrides: Sequence[str], error: str) -> None:
    try:
        write_summary(folder, "failed", overrides, {"error": error})
    except OSError:  # a full disk, say, which may be why
        print(error, file=sys.stderr)


def _begun(folder: Path, config: RunConfig) -> bool:
    """Whether a run of this very configuration has saved something there to go on from."""
    from rlhf.checkpoint.keeper import CONFIG, FOLDER
    from rlhf.checkpoint.state import plain
    from rlhf.checkpoint.store import Store

    store = Store(folder / FOLDER)
    newest = store.newest()
    if newest is None or json.loads((store.path(newest) / CONFIG).read_text(encoding="utf-8")) != plain(config):
        return False
    print(f"begun already, goes on after step {newest}: {folder}")
    return True


class SweepTable(Callback):
    """Rewrites the tables and the plot of a sweep after every job."""

    def on_job_end(self, config: Any, job_return: JobReturn, **kwargs: Any) -> None:
        """Note why the job failed, if it did. Hydra calls this in single runs, too, which have no table."""
        if config.hydra.mode is not RunMode.MULTIRUN:
            return
        if job_return.status is JobStatus.FAILED:
            error = str(job_return._return_value)
            print(f"job {config.hydra.job.num} failed: {printable(error)}", file=sys.stderr)
            folder = Path(config.hydra.runtime.output_dir)
            if read_summary(folder).get("error") != error:  # else run_job has noted it
                write_summary(folder, "failed", list(config.hydra.overrides.task), {"error": error})
        sweep = Path(config.hydra.sweep.dir)
        print(f"sweep so far, {write_tables(sweep)} job(s): {sweep / 'summary.md'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m rlhf.sweep DIR`: tables and plot of a sweep again, from its folders."""
    outlast()
    about = "Write the tables and the plot of a sweep again, from its folders."
    parser = argparse.ArgumentParser("python -m rlhf.sweep", description=about)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a sweep, whose jobs are DIR/0, DIR/1, ...")
    objectives = [each.value for each in Objective]
    said = f"what the leaderboard is sorted by: {', '.join(objectives)}"
    parser.add_argument("--by", choices=objectives, metavar="NAME", help=said)
    given = parser.parse_args(arguments)
    if not runs_below(given.folder):
        parser.error(f"{given.folder} holds no jobs of a sweep (DIR/0/.hydra/config.yaml, ...)")
    try:
        count = write_tables(given.folder, Objective(given.by) if given.by else None)
    except OSError as error:
        parser.error(f"nothing can be written into {given.folder} ({error.strerror})")
    print((given.folder / "summary.md").read_text(encoding="utf-8"))
    print(f"{count} job(s): {given.folder}/summary.md, leaderboard.csv, summary.csv, comparison.png")


if __name__ == "__main__":
    main()
