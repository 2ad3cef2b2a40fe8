"""Sweeps: each job in a process of its own, finished jobs skipped, and one table that is rewritten after every job."""

from __future__ import annotations

import csv
import multiprocessing
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode

from rlhf.comparison import plot_comparison
from rlhf.config import RunConfig
from rlhf.ending import EXPLAINED, RunError, end_with_parent, terminate_as_interrupt
from rlhf.report import read_summary, write_summary

COLUMNS = (
    "reward_end",
    "gold_end",
    "greedy_accuracy_end",
    "kl_end",
    "step_ms",
    "transfer_ms",
    "transfer_share",
    "seconds",
)
END_S = 30.0  # how long an interrupted job may take to end by itself


def run_job(config: RunConfig, folder: Path, overrides: Sequence[str]) -> None:
    """Train in a fresh process, unless this folder holds the finished job already; RunError if the job dies."""
    summary = read_summary(folder)
    if summary.get("status") == "finished" and summary.get("overrides") == list(overrides):
        print(f"finished already, skipped: {folder}")
        return
    (folder / "summary.json").unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(config, folder, list(overrides)))
    process.start()
    try:
        process.join()
    finally:
        if process.is_alive():  # this process was interrupted
            process.terminate()
            process.join(END_S)
            process.kill()
            write_summary(folder, "interrupted", overrides, {})
    if process.exitcode:
        raise RunError(read_summary(folder).get("error", f"the process died with exit code {process.exitcode}"))


def _child(config: RunConfig, folder: Path, overrides: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the parent, which then ends this
    terminate_as_interrupt()
    end_with_parent()
    from rlhf.run import run

    try:
        run(config, folder, overrides)
    except EXPLAINED as error:
        write_summary(folder, "failed", overrides, {"error": str(error)})
        sys.exit(1)
    except Exception as error:
        write_summary(folder, "failed", overrides, {"error": f"{type(error).__name__}: {error}"})
        raise


class SweepTable(Callback):
    """Rewrites `summary.md`, `summary.csv` and `comparison.png` of a sweep after every job."""

    def on_job_end(self, config: Any, job_return: JobReturn, **kwargs: Any) -> None:
        """Note why the job failed, if it did. Hydra calls this in single runs, too, which have no table."""
        if config.hydra.mode is not RunMode.MULTIRUN:
            return
        if job_return.status is JobStatus.FAILED:
            error = str(job_return._return_value)
            print(f"job {config.hydra.job.num} failed: {error}", file=sys.stderr)
            folder = Path(config.hydra.runtime.output_dir)
            write_summary(folder, "failed", list(config.hydra.overrides.task), {"error": error})
        write_table(Path(config.hydra.sweep.dir))


def write_table(sweep: Path) -> None:
    """Read every job's folder below `sweep` and rewrite the table and the plot."""
    jobs = sorted((path.parent.parent for path in sweep.glob("*/.hydra/config.yaml")), key=_number)
    rows = [_row(job) for job in jobs]
    header = ["job", "status", "overrides", *COLUMNS, "error"]
    with open(sweep / "summary.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in header) + " |" for row in rows]
    (sweep / "summary.md").write_text("\n".join(lines) + "\n")
    plot_comparison(jobs, sweep / "comparison.png")
    print(f"sweep so far, {len(rows)} job(s): {sweep / 'summary.md'}")


def _row(job: Path) -> dict[str, Any]:
    summary = read_summary(job)
    row: dict[str, Any] = {
        "job": job.name,
        "status": summary.get("status", "unfinished"),
        "overrides": " ".join(summary.get("overrides", [])),
        "error": summary.get("error", ""),
    }
    return row | {name: summary.get(name, "") for name in COLUMNS}


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _number(job: Path) -> tuple[int, str]:
    return (int(job.name) if job.name.isdigit() else 10**9, job.name)
