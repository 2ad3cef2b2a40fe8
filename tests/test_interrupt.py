"""Ctrl-C, SIGTERM and kill -9 in every phase: nothing is left, the exit code tells, and a dead worker is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from living import living_in, processes_in
from run_with_fault import PHASES
from shared_memory import left_in_shared_memory
from sizes import sized

from transfer.worker.ray_start import sweep

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(__file__).with_name("run_with_fault.py")
GONE_S = 20.0  # how long what ends by itself may take
SMALL = ("experiment=smoke", "reward=model", "reward.prompts=64", "reward.steps=20", "hydra.run.dir=run")
DEADLINES = ("transfer.sender.timeout_s=10", "rollout.timeout_s=20")
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
LIVE_VIEW = "ipc transfer.staging=live transfer.take=view"
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
VICTIMS = {"SIGINT": "group", "SIGTERM": "trainer", "SIGKILL": "trainer"}
RESUMABLE = {phase: 75 for phase in list(PHASES)[list(PHASES).index("sampling") :]}  # of SIGTERM, once there is a state

pytestmark = pytest.mark.usefixtures("default_signals")

STOPS = [(phase, signum) for signum in VICTIMS for phase in PHASES]
LIKE_OTHERS = [
    *((phase, "SIGTERM") for phase in ("warm-up", "pairs", "learning", "withdrawing")),
    *((phase, "SIGKILL") for phase in ("warm-up", "pairs", "reward model", "learning", "withdrawing", "finishing")),
]
STOPS_OF_RAY = [
    *(("sampling", "SIGINT"), ("warm-up", "SIGINT"), ("warm-up", "SIGTERM")),
    *(("sampling", "SIGKILL"), ("finishing", "SIGINT"), ("finishing", "SIGTERM")),
]
UNHEALED = [
    *((phase, "http") for phase in ("starting workers", "sampling", "staging", "finishing")),
    *((phase, "ray") for phase in ("sampling", "staging", "starting workers", "finishing")),
]
HEALED = [
    *((phase, "disk", "http") for phase in ("finishing", "sampling")),
    *((phase, "ipc", "http") for phase in ("pairs", "sampling", "staging", "finishing")),
    *((phase, LIVE_VIEW, "http") for phase in ("sampling", "withdrawing", "learning", "finishing")),
    *((phase, "ipc", "ray") for phase in ("staging", "pairs")),
]


@dataclass
class Ended:
    """A run that was harmed, after its trainer has ended."""

    code: int
    output: str
    errors: str
    survivors: list[str]  # command lines of its processes that are still there; without one, no port listens
    shared_memory: set[str]  # new entries of /dev/shm
    temporary: list[str]  # what is left in its folder for temporary files


@pytest.fixture
def temporary():
    """A folder with a short name, since Ray has sockets in it."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield folder


@pytest.fixture
def ended(tmp_path, temporary):
    """`ended(argument...) -> Ended` runs Python with these arguments until it ends."""

    def run(*arguments: str) -> Ended:
        before = set(os.listdir("/dev/shm"))
        variables = {"PYTHONPATH": str(ROOT), "TMPDIR": temporary}
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "torch")  # torch makes it when it is imported
        with open(tmp_path / "stdout", "w") as output, open(tmp_path / "stderr", "w") as errors:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=tmp_path,
                env=os.environ | variables,
                stdout=output,
                stderr=errors,
                start_new_session=True,  # a process group of its own, as a terminal gives it
            )
            try:
                code = process.wait(100)
            finally:
                process.kill()
        deadline = time.monotonic() + GONE_S
        while (survivors := living_in(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.1)
        new = left_in_shared_memory(before, GONE_S)
        said = [(tmp_path / name).read_text() for name in ("stdout", "stderr")]
        return Ended(code, *said, survivors, new, os.listdir(temporary))

    return run


@pytest.fixture
def harmed(ended):
    """`harmed(phase, victim, signal, override...) -> Ended`."""
    return lambda phase, victim, signum, *overrides: ended(
        str(SCRIPT), phase, victim, signum, *SMALL, *DEADLINES, *overrides
    )


def assert_nothing_is_left(ended: Ended) -> None:
    left = [name for name in ended.temporary if name != "ray"]  # Ray keeps the logs of its sessions
    assert (ended.survivors, ended.shared_memory, left) == ([], set(), [])


@pytest.mark.slow
def test_what_a_process_of_a_run_has_started_is_found(tmp_path):
    command = "import subprocess, sys; subprocess.run(['sleep', '60'], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", command], cwd=tmp_path) as process:
        deadline = time.monotonic() + GONE_S
        while "sleep 60" not in living_in(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.1)
        found = living_in(tmp_path)
        process.kill()
    assert "sleep 60" in found and living_in(tmp_path) == ["sleep 60"]
    for survivor in processes_in(tmp_path):
        survivor.kill()


@pytest.mark.parametrize("moment", sized(STOPS, less=LIKE_OTHERS), ids=" ".join)
def test_a_run_that_is_stopped_leaves_nothing(harmed, moment):
    phase, signum = moment
    ended = harmed(phase, VICTIMS[signum], signum)
    assert_nothing_is_left(ended)
    assert ended.code == (RESUMABLE.get(phase, 143) if signum == "SIGTERM" else EXIT_CODES[signum])
    assert "Traceback" not in ended.errors


@pytest.mark.parametrize("moment", sized(STOPS_OF_RAY, less=STOPS_OF_RAY[1:3]), ids=" ".join)
def test_a_run_with_ray_that_is_stopped_leaves_nothing(harmed, temporary, moment):
    phase, signum = moment
    ended = harmed(phase, VICTIMS[signum], signum, "transfer/sender=ray")
    if signum == "SIGKILL":  # Ray's agents tell its dead server for a minute that it is dead, and then end
        ended.survivors = [each for each in ended.survivors if not each.startswith(AGENTS)]
        assert len(ended.temporary) == 1
        sweep(Path(temporary))  # as the next private Ray does
        ended.temporary = os.listdir(temporary)
    assert_nothing_is_left(ended)
    assert ended.code == (RESUMABLE.get(phase, 143) if signum == "SIGTERM" else EXIT_CODES[signum])
    assert "Traceback" not in ended.errors


@pytest.mark.parametrize("moment", sized(UNHEALED, less=UNHEALED[-2:]), ids=" ".join)
def test_without_restarts_a_worker_that_is_killed_is_named_in_the_one_line_that_the_run_ends_with(harmed, moment):
    phase, sender = moment
    ended = harmed(phase, "worker", "SIGKILL", f"transfer/sender={sender}", "rollout.restarts=0")
    assert ended.code == 1
    assert "worker 0" in ended.errors and "Traceback" not in ended.errors
    assert_nothing_is_left(ended)


@pytest.mark.slow
def test_without_restarts_a_worker_that_may_still_serve_the_trainers_own_memory_ends_the_run_and_is_named(harmed):
    ended = harmed("withdrawing", "worker", "SIGKILL", *f"transfer={LIVE_VIEW}".split(), "rollout.restarts=0")
    assert ended.code == 1
    assert "withdrawing version 1 failed: worker 0" in ended.errors and "Traceback" not in ended.errors
    assert_nothing_is_left(ended)


@pytest.mark.parametrize("moment", sized(HEALED, less=HEALED[:1] + HEALED[-1:]), ids=" ".join)
def test_a_worker_that_is_killed_is_started_again_and_the_run_has_the_numbers_of_one_undisturbed(
    harmed, undisturbed, tmp_path, moment
):
    phase, backend, sender = moment
    choice = (*f"transfer={backend}".split(), f"transfer/sender={sender}")
    disturbed = harmed(phase, "worker", "SIGKILL", *choice)
    assert disturbed.code == 0, disturbed.errors
    assert "warning: worker 0" in disturbed.output and "was started again" in disturbed.output
    assert_nothing_is_left(disturbed)
    assert numbers(tmp_path / "run") == undisturbed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The numbers of the run, which are the same for every way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "rlhf.train", *SMALL]
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=100)
    return numbers(folder / "run")


def numbers(folder: Path) -> list[dict[str, float]]:
    """What a run measured, but for times, and bytes of messages."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "train/", "eval/", "rollout/")
    return [{key: value for key, value in row.items() if key.startswith(kept)} for row in rows]


@pytest.mark.slow
def test_a_worker_that_hangs_ends_the_run_at_the_deadline_and_is_gone(harmed):
    ended = harmed("sampling", "worker", "SIGSTOP", "rollout.timeout_s=2")
    assert ended.code == 1
    assert "completions: no answer within 2 s" in ended.errors and "Traceback" not in ended.errors
    assert_nothing_is_left(ended)


REWARDS = """
import os, signal

def interrupts(prompts, completions, **columns):
    os.killpg(0, signal.SIGINT)
    return [0.0] * len(prompts)

def terminates(prompts, completions, **columns):
    os.kill(os.getppid(), signal.SIGTERM)
    return [0.0] * len(prompts)

def kills(prompts, completions, **columns):
    os.kill(os.getppid(), signal.SIGKILL)
    return [0.0] * len(prompts)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "signum"), [("interrupts", "SIGINT"), ("terminates", "SIGTERM"), ("kills", "SIGKILL")]
)
def test_a_sweep_that_is_stopped_takes_its_job_along(ended, tmp_path, function, signum):
    (tmp_path / "mine.py").write_text(REWARDS)
    reward = ("reward=function", f"reward.function=mine:{function}", "steps=100000", "seed=0,1")
    stopped = ended("-m", "rlhf.train", "-m", "experiment=smoke", *reward, "hydra.sweep.dir=sweep")
    assert_nothing_is_left(stopped)
    assert stopped.code == EXIT_CODES[signum]
    assert "Traceback" not in stopped.errors
    assert not (tmp_path / "sweep/1").exists()
