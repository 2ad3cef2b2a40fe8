"""Signals that end a run: which, what of them stays ignored, and whether they wait for a step's end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlhf.shell.ending import STOPS, terminate_as_interrupt, unbroken

ROOT = Path(__file__).resolve().parent.parent
TERM, INT, HUP, USR1, USR2 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2

pytestmark = pytest.mark.usefixtures("default_signals")


@pytest.fixture
def handlers():
    """All handlers put back."""
    before = {signum: signal.getsignal(signum) for signum in (*STOPS, INT)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(("signum", "code"), [(TERM, 143), (HUP, 129), (USR1, 138), (USR2, 140)])
def test_signals_by_which_schedulers_announce_the_end_unwind_with_the_exit_code_of_shells(handlers, signum, code):
    terminate_as_interrupt()
    with pytest.raises(SystemExit) as stopped:
        os.kill(os.getpid(), signum)
        time.sleep(5)
    assert stopped.value.code == code


@pytest.mark.parametrize("signum", [HUP, USR1, USR2])
def test_what_the_parent_has_made_ignored_stays_so_as_nohup_asks(handlers, signum):
    signal.signal(signum, signal.SIG_IGN)
    terminate_as_interrupt()
    os.kill(os.getpid(), signum)
    assert signal.getsignal(signum) is signal.SIG_IGN
    assert all(callable(signal.getsignal(other)) for other in STOPS if other != signum)


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [
        (USR1, TERM, True),  # Slurm's --signal, and the end of the time limit
        (HUP, HUP, True),  # a terminal that is closed: by the kernel and by its shell
        (TERM, HUP, True),
        (TERM, TERM, False),
        (USR1, USR1, False),
        (TERM, INT, False),
        (INT, TERM, False),
    ],
)
def test_a_second_signal_waits_for_the_end_of_the_step_unless_somebody_insists(handlers, first, second, waits):
    terminate_as_interrupt()
    ended = False
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped, unbroken():
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), second)
        ended = True
    assert ended == waits
    if waits:
        assert stopped.value.code == 128 + first


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def started():
    """`started(folder, "nohup", transfer="ipc")`: a run that has logged three rows; it ends with the test."""
    runs: list[subprocess.Popen[str]] = []

    def start(folder: Path, *command: str, transfer: str) -> subprocess.Popen[str]:
        runs.append(begun(folder, *command, transfer=transfer))
        logged(folder, runs[-1], 3)
        return runs[-1]

    yield start
    for process in runs:
        process.kill()
        process.wait(20)


SMALL = ("experiment=smoke", "logger=jsonl", "task.held_out=16", "sft.steps=10", "prompts_per_step=4", "steps=100000")


def begun(folder: Path, *command: str, transfer: str) -> subprocess.Popen[str]:
    line = [*command, sys.executable, "-m", "rlhf.train", *SMALL, f"transfer={transfer}", "hydra.run.dir=run"]
    with (folder / "output").open("w") as output:
        return subprocess.Popen(
            line,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )


def logged(folder: Path, process: subprocess.Popen[str], rows: int) -> None:
    """Wait until the run has logged so many rows."""
    path, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 90
    while not path.exists() or path.read_bytes().count(b"\n") < rows:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "output").read_text()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [HUP, USR1, USR2])
def test_a_signal_to_all_processes_of_a_job_saves_the_run_and_kills_no_worker(started, tmp_path, signum):
    process = started(tmp_path, transfer="ipc")
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        each.send_signal(signum)
    code, said = process.wait(60), (tmp_path / "output").read_text()
    assert code == 75 and "is saved: go on with" in said and "Traceback" not in said, said
    assert "was started again" not in said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"


@pytest.mark.slow
def test_a_run_under_nohup_outlives_its_terminal(started, tmp_path):
    process = started(tmp_path, "nohup", transfer="local")
    process.send_signal(HUP)
    rows = (tmp_path / "run" / "metrics.jsonl").read_bytes().count(b"\n")
    logged(tmp_path, process, rows + 5)
    process.terminate()
    assert process.wait(60) == 75
