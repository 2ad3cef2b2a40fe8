"""Shared by all tests: one torch thread, and runs composed as the command line composes them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import forked
import pytest
from history import check

if forked.FRESH not in os.environ and find_spec("setproctitle"):
    forked.use()
ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session):
    """What tests need from their import on; a process that only hands tests out needs none of it."""
    if session.config.getoption("tx", None) and not hasattr(session.config, "workerinput"):
        return
    import hypothesis
    import torch

    # On a busy machine, or at its first run, drawing an example takes long; pytest's own timeout ends what hangs.
    patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    hypothesis.settings.register_profile("suite", **patient)
    hypothesis.settings.load_profile("suite")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def histories_hold(request):
    """Whatever a test did with weights: the journals below its `tmp_path` obey the rules of history.py.

    A test of runs with `rollout.ahead.lag` has the marker `lag`.
    """
    if "tmp_path" not in request.fixturenames:
        yield
        return
    folder, marker = request.getfixturevalue("tmp_path"), request.node.get_closest_marker("lag")
    yield
    for journals in sorted(folder.rglob("journal")):
        counts = check(journals, *(marker.args if marker else ()))
        summary = journals.parent / "summary.json"
        if summary.exists() and json.loads(summary.read_text())["status"] == "finished":
            missing = {"open", "publish", "pushed", "init", "finish", "serve", "consume"} - set(counts)
            assert not missing, f"{journals}: a whole run has no {sorted(missing)} (only {dict(counts)})"


@pytest.fixture
def default_signals():
    """Signals end this process, and what it starts, as in a terminal: shells have background jobs ignore SIGINT."""
    stops = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    wanted = {signal.SIGINT: signal.default_int_handler, **dict.fromkeys(stops, signal.SIG_DFL)}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def compose_run():
    """`compose_run("algo=ppo", ...) -> RunConfig`."""
    from composed import composed_run

    return composed_run


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """Runs in this process draw no `curves.png`, which takes as long as a small run's steps; what draws it."""
    from rlhf.assembly import outcome

    plain = outcome.plot_curves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "plot_curves", lambda *_: None)
        yield plain


@pytest.fixture
def drawn(undrawn, monkeypatch):
    """But for those of a test with this."""
    monkeypatch.setattr("rlhf.assembly.outcome.plot_curves", undrawn)


@pytest.fixture
def rlhf_train(tmp_path):
    """`rlhf_train("algo=ppo", ...)` runs the command line in an empty folder: a CompletedProcess with text output."""

    def run(*arguments: str, timeout: float = 100, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "rlhf.train", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
        options = {"cwd": tmp_path, "capture_output": True, "text": True} | options
        return subprocess.run(command, env=environment, timeout=timeout, check=False, **options)

    return run
