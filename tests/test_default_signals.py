"""Signals under a shell that ignores SIGINT in its background jobs: the tests do not mind, and programs keep to it."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KILLS_ITSELF = """
import os, signal
from rlhf.shell.ending import terminate_as_interrupt, unbroken
terminate_as_interrupt()
with unbroken():
    os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.{then})
print("goes on")
"""


@contextmanager
def in_the_background():
    """As a shell without job control, or nohup, starts a job."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def told(then="SIGINT"):
    """How a program ends that gets SIGINT and then another signal."""
    command = [sys.executable, "-c", KILLS_ITSELF.format(then=then)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_program_in_the_background_goes_on_after_sigint_and_ends_with_sigterm():
    with in_the_background():
        assert told().stdout == "goes on\n"
        assert told("SIGTERM").returncode == 143


def test_what_tests_start_gets_signals_as_in_a_terminal(request):
    with in_the_background():
        request.getfixturevalue("default_signals")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ended = told()
        assert ended.returncode == -signal.SIGINT and "KeyboardInterrupt" in ended.stderr


def test_every_test_that_sends_sigint_or_sigterm_to_what_it_starts_has_default_signals():
    lacking = []
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        text = path.read_text()
        if "SIGINT" in text and "default_signals" not in text:
            lacking.append(path.name)
    assert not lacking
