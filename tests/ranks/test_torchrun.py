"""Ranks that torchrun has started hear from the first what to run, or that there is nothing to run."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from forked_ranks import DEADLINE_S, FORK

import rlhf.train as train
from rlhf import beside
from rlhf.ranks import torchrun
from rlhf.ranks.place import by_torchrun

SOON_S = 30.0  # torchrun's own patience with a process that it has told to end, and a twentieth of a store's


class Process:
    """A process among those of torchrun, forked, and what its work gives."""

    def __init__(self, number: int, port: int, work: Callable[[], Any]) -> None:
        self._ours, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_work, args=(number, port, work, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def gives(self) -> Any:
        assert self._ours.poll(DEADLINE_S), "it hangs"
        return self._ours.recv()


def _work(number: int, port: int, work: Callable[[], Any], pipe: Any) -> None:
    told = {"RANK": number, "WORLD_SIZE": 3, "LOCAL_RANK": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    pipe.send(work())
    while pipe.poll(DEADLINE_S):  # until the test is done with it
        pipe.recv()


@pytest.fixture
def started() -> Iterator[Callable[[int, Callable[[], Any]], Process]]:
    """`started(number, work)`: a process of three, by an agent that keeps no store."""
    made: list[Process] = []
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    yield lambda number, work: made.append(Process(number, port, work)) or made[-1]
    for each in made:
        each.process.kill()
        each.process.join()


def heard() -> str:
    place = by_torchrun()
    assert place is not None
    return torchrun.heard(place)


def test_each_rank_hears_what_it_is_to_run_however_late_it_asks(started):
    early = started(2, heard)
    time.sleep(0.2)
    started(0, lambda: torchrun.tell(["run 1", "run 2"]))
    assert early.gives() == "run 2"
    assert started(1, heard).gives() == "run 1"


def test_ranks_have_nothing_to_run_once_the_first_has_ended_without_a_run(started):
    others = [started(number, beside.started_by_torchrun) for number in (1, 2)]
    first = started(0, lambda: torchrun.release(3))
    assert first.gives() is None
    assert [each.gives() for each in others] == [True, True]


def test_the_first_rank_tells_no_one_that_there_is_nothing_to_run_if_there_is(started):
    def told_and_released() -> None:
        torchrun.tell(["run 1", "run 2"])
        torchrun.release(3)

    started(0, told_and_released)
    assert [started(number, heard).gives() for number in (1, 2)] == ["run 1", "run 2"]


@pytest.mark.usefixtures("default_signals")
def test_while_it_waits_for_what_to_run_another_rank_leaves_ctrl_c_to_the_first_and_ends_by_sigterm(started):
    waiting = started(1, beside.started_by_torchrun).process
    deadline = time.monotonic() + DEADLINE_S
    while not ignores(waiting.pid, signal.SIGINT):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(waiting.pid, signal.SIGINT)
    waiting.join(0.3)
    assert waiting.is_alive()
    os.kill(waiting.pid, signal.SIGTERM)
    waiting.join(SOON_S)
    assert waiting.exitcode == -signal.SIGTERM


def ignores(pid: int, signum: int) -> bool:
    with open(f"/proc/{pid}/status") as file, contextlib.suppress(StopIteration):
        mask = next(line for line in file if line.startswith("SigIgn"))
        return bool(int(mask.split()[1], 16) >> (signum - 1) & 1)
    return False


def test_a_command_line_that_runs_nothing_frees_the_others_as_it_ends(started, monkeypatch):
    registered: list[Any] = []

    def first() -> bool:
        monkeypatch.setattr(beside.atexit, "register", lambda *call: registered.append(call))
        runs_here = not beside.started_by_torchrun()
        ((function, *arguments),) = registered
        function(*arguments)
        return runs_here

    other = started(1, beside.started_by_torchrun)
    started(2, beside.started_by_torchrun)
    assert started(0, first).gives() is True
    assert other.gives() is True


def test_help_is_answered_by_each_process_and_waits_for_none(monkeypatch, capsys):
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["rlhf.train", "--version"])
    train.main()
    assert capsys.readouterr().out.startswith("rlhf ")
