"""`rlhf scale`: what the command says, and whole runs whose workers become more and fewer, with the same numbers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from composed import composed_run
from living import living_in
from shared_memory import left_in_shared_memory

from rlhf.rollout.scaling import Scaling
from rlhf.run import run
from rlhf.scale import main
from rlhf.shell import scale_files
from rlhf.shell.ending import alone
from rlhf.shell.scale_files import Answer, Request
from transfer.worker.process import SOURCE, WorkerProcess

SMALL = (
    *("experiment=smoke", "logger=jsonl", "task.held_out=16", "task.prompts=256", "sft.steps=4", "prompts_per_step=4"),
    *("steps=6", "evaluate_every=3", "checkpoint.every=3"),
)
pytestmark = pytest.mark.usefixtures("default_signals")


# --- the command, without a run ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Of a run that has written its status."""
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "stage": "grpo", "done": 3, "of": 9}))
    return tmp_path


@pytest.fixture
def going(folder):
    """A run goes on in the folder."""
    with alone(folder):
        yield folder


def refused(*arguments: object) -> int:
    """The command's exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(each) for each in arguments])
    return end.value.code


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "say how many workers there are to be, or --join URL"),
        (["2", "--join", "http://a"], "say how many workers there are to be, or --join URL"),
        (["0"], "a run has at least 1 worker (got 0)"),
        (["-1"], "a run has at least 1 worker (got -1)"),
        (["--join", "localhost:80"], "--join must be like http://127.0.0.1:8000 (got 'localhost:80')"),
        (["two"], "invalid int value: 'two'"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused_in_one_line(folder, capsys, arguments, line):
    assert refused(folder, *arguments) == 2
    assert line in capsys.readouterr().err and not scale_files.waiting(folder)


def test_a_folder_without_a_run_that_goes_on_is_said(folder, capsys):
    assert refused(folder / "nothing", 2) == 1
    assert "is no folder of a run: it has none of .hydra/config.yaml" in capsys.readouterr().err
    assert refused(folder, 2) == 1
    told = f"no run goes on in {folder}: a resume begins with as many as its rollout.workers says\n"
    assert capsys.readouterr().err == told and list(folder.iterdir()) == [folder / "status.json"]


def test_dpo_samples_nothing_between_steps(going, capsys):
    (going / ".hydra").mkdir()
    (going / ".hydra" / "config.yaml").write_text("algo:\n  name: dpo\n")
    assert refused(going, 2) == 1
    assert "algo=dpo samples before it learns" in capsys.readouterr().err


def test_a_request_that_nobody_takes_is_taken_back(going, capsys):
    assert refused(going, 2, "--wait", 0.3) == 1
    told = "the run did not look within --wait (it is in grpo 3/9): nothing is changed\n"
    assert capsys.readouterr().err == told and not scale_files.waiting(going)


def test_a_request_that_waits_already_is_left_there(going, capsys):
    scale_files.post(going, Request(workers=3))
    assert refused(going, 2) == 1
    assert "somebody else has asked this run already" in capsys.readouterr().err
    assert scale_files.taken(going).workers == 3


@pytest.fixture
def meanwhile(monkeypatch):
    """`meanwhile(f, g)`: what happens between two looks of the command."""

    def happens(*acts: Callable[[], object]) -> None:
        left = iter(acts)
        monkeypatch.setattr("rlhf.scale.time.sleep", lambda seconds: next(left)())

    return happens


def answers(folder: Path, *said: tuple[str, str]) -> list[Callable[[], None]]:
    """What a run does that takes the request and says this."""
    taken: list[Request] = []

    def answer(state: str, line: str) -> None:
        if not taken:
            taken.append(scale_files.taken(folder))
        scale_files.answer(folder, Answer(taken[0].id, state, line))

    return [partial(answer, *each) for each in said]


def test_progress_is_a_line_each_and_the_last_line_is_the_answer(going, meanwhile, capsys):
    coming = ("going", "1 worker now, 1 coming up")
    meanwhile(*answers(going, coming, coming, ("done", "2 workers now, 1 before")))
    main([str(going), "2"])
    said = capsys.readouterr().out.splitlines()
    assert said == ["asked: the run looks between two steps", "1 worker now, 1 coming up", "2 workers now, 1 before"]
    assert list(going.iterdir()) == [going / "status.json"]


def test_what_the_run_says_against_it_is_the_error(going, meanwhile, capsys):
    meanwhile(*answers(going, ("failed", "1 worker now, as before; worker 1 died")))
    assert refused(going, 2) == 1
    assert capsys.readouterr().err == "1 worker now, as before; worker 1 died\n"


def test_a_run_that_is_still_at_it_when_the_command_gives_up_is_said(going, meanwhile, monkeypatch, capsys):
    late = lambda: monkeypatch.setattr("rlhf.scale.time.monotonic", lambda: float("inf"))  # noqa: E731
    (goes,) = answers(going, ("going", "1 worker now, 1 coming up"))
    meanwhile(lambda: (goes(), late()))
    assert refused(going, 2) == 1
    told = "the run is still at it: 1 worker now, 1 coming up; what comes of it is on its screen\n"
    assert capsys.readouterr().err == told


def test_a_run_that_ends_meanwhile_is_said(folder, meanwhile, capsys):
    with ExitStack() as held:
        held.enter_context(alone(folder))
        meanwhile(held.close)
        assert refused(folder, 2) == 1
    assert capsys.readouterr().err == f"the run in {folder} has ended meanwhile\n"
    assert not scale_files.waiting(folder)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_ended_takes_its_request_back(going, meanwhile, signum, code):
    meanwhile(lambda: os.kill(os.getpid(), signum))
    assert refused(going, 2) == code and not scale_files.waiting(going)


def test_a_request_that_is_taken_back_leaves_nothing_and_one_of_somebody_else_as_it_is(folder):
    ours, theirs = Request(2, token=None), Request(3)
    scale_files.post(folder, ours)
    assert scale_files.withdrawn(folder, ours) and not scale_files.withdrawn(folder, ours)
    assert {path.name for path in folder.iterdir()} == {"status.json"}
    scale_files.post(folder, theirs)
    assert not scale_files.withdrawn(folder, ours)
    assert {path.name for path in folder.iterdir()} == {"status.json", scale_files.REQUEST}
    assert scale_files.taken(folder) == theirs and not scale_files.waiting(folder)


def test_a_request_is_the_runs_or_taken_back_and_never_both(folder, monkeypatch):
    request, read, back = Request(2), scale_files._read, []

    def slowly(path):
        monkeypatch.setattr(scale_files, "_read", read)
        told = read(path)
        back.append(scale_files.withdrawn(folder, request))  # by the command, before the run has removed it
        return told

    scale_files.post(folder, request)
    monkeypatch.setattr(scale_files, "_read", slowly)
    assert scale_files.taken(folder) == request and back == [False]
    assert {path.name for path in folder.iterdir()} == {"status.json"}


def test_help_comes_without_anything_heavy():
    command = [sys.executable, "-c", "import sys, light; light.refuse(); from rlhf.scale import main; main(['--help'])"]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(SOURCE), str(SOURCE / "tests")])}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--join" in done.stdout and done.stderr == ""


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(compose_run, tmp_path, monkeypatch):
    """`train("transfer=disk", name="a", before={2: f})`: the folder; `f(scaling)` is called before step 2.

    The run waits there for workers that come up.
    """

    def trained(*overrides: str, name: str, before: dict[int, Callable[[Scaling], None]] | None = None) -> Path:
        steps, plain = count(1), Scaling.look

        def look(scaling):
            act = (before or {}).get(next(steps))
            if act is not None:
                act(scaling)
            plain(scaling)
            deadline = time.monotonic() + 60
            while scaling._change is not None and scaling._change.starting and time.monotonic() < deadline:
                time.sleep(0.02)
                plain(scaling)

        with monkeypatch.context() as patch:
            patch.setattr(Scaling, "look", look)
            run(compose_run(*SMALL, *overrides), tmp_path / name, overrides)
        return tmp_path / name

    return trained


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a run with one worker, always."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(composed_run(*SMALL, "transfer=local"), folder)
    return folder


class Asking:
    """Asks a run, as the command does; `lines` are its last words of each request."""

    def __init__(self) -> None:
        self._requests: list[tuple[Path, Request]] = []

    def __call__(self, **what) -> Callable[[Scaling], None]:
        return lambda scaling: self.ask(scaling, Request(**what))

    def ask(self, scaling: Scaling, request: Request) -> None:
        scale_files.post(scaling._folder, request)
        self._requests.append((scaling._folder, request))

    def heard(self, scaling: Scaling) -> None:
        """Note the answer to the last request."""
        self.lines = [*getattr(self, "lines", []), scale_files.heard(*self._requests[-1]).line]


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> list[dict[str, float]]:
    """All metrics but times, how many workers there are, and the one whose last bits depend on that."""
    left_out = ("seconds/", "transfer/", "tokens_per_second", "rollout/workers", "rollout/sampling_s", "train/mismatch")
    return [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in rows(folder)]


def events(folder: Path, *ops: str, of: str = "trainer") -> list[dict[str, object]]:
    told = map(json.loads, (folder / f"journal/{of}.jsonl").read_text().splitlines())
    return [event for event in told if event["op"] in ops]


def worker_processes() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if "rlhf.rollout.worker" in each.cmdline()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        "transfer=ipc",
        "transfer=gloo",
        "transfer.staging=live transfer.take=copy",
        "transfer.staging=live transfer.take=view",
        "transfer=disk transfer/sender=ray",
        "trainer=sharded trainer.ranks=2",
        "trainer=sharded trainer.ranks=2 transfer=gloo",
    ],
)
def test_a_run_whose_workers_are_one_then_three_then_one_has_the_numbers_of_one_with_one(train, plain, overrides):
    ask = Asking()
    waits = "take=copy" in overrides  # for the next version, as that of the parameters may have changed
    before = {2: ask(workers=3), 3 + waits: ask.heard, 5: ask(workers=1), 6: ask.heard}
    changed = train(*overrides.split(), name="changed", before=before)
    assert ask.lines == ["3 workers now, 1 before", "1 worker now, 3 before"]
    assert numbers(changed) == numbers(plain)
    assert [row.get("rollout/workers") for row in rows(changed) if "train/loss" in row] == [
        *([None, None, 3, 3, 1, 1] if waits else [None, 3, 3, 3, 1, 1])
    ]
    served = [version for event in events(changed, "serve", of="worker-2") for version in event["versions"]]
    assert set(served) == ({2, 3} if waits else {1, 2, 3})
    moves = [(event["op"], event["worker"].partition(" (")[0]) for event in events(changed, "join", "leave")]
    assert sorted(moves) == [(op, f"worker {index}") for op in ("join", "leave") for index in (1, 2)]
    assert worker_processes() == []


@pytest.mark.slow
def test_newcomers_that_are_killed_as_they_start_and_later_change_nothing(train, plain, monkeypatch):
    ask, started, enter = Asking(), [], WorkerProcess.__enter__

    def noted(process):
        started.append(enter(process))
        if len(started) == 2:  # of which the first began with the run
            os.kill(process.pid, signal.SIGKILL)
        return process

    def again(scaling: Scaling) -> None:
        ask.heard(scaling)
        ask(workers=2)(scaling)

    def kill_the_newcomer(scaling: Scaling) -> None:
        ask.heard(scaling)
        os.kill(started[-1].pid, signal.SIGKILL)

    monkeypatch.setattr(WorkerProcess, "__enter__", noted)
    before = {2: ask(workers=2), 3: again, 5: kill_the_newcomer}
    changed = train(name="changed", before=before)
    died, came = ask.lines
    assert re.fullmatch(r"1 worker now, as before; worker 1 died while it started; .*worker-1\.log", died)
    assert came == "2 workers now, 1 before" and numbers(changed) == numbers(plain)
    assert [event["worker"].partition(" (")[0] for event in events(changed, "rejoin")] == ["worker 1"]
    assert worker_processes() == []


@pytest.mark.slow
def test_a_worker_that_runs_already_joins_by_its_url_with_its_token_and_goes_on_when_it_has_left(
    train, plain, tmp_path
):
    ask, outside = Asking(), SimpleNamespace()
    with ExitStack() as stack:

        def start(scaling: Scaling) -> None:
            spec = replace(scaling._workers._spec, token="secret", journal=str(tmp_path / "joined/worker-9.jsonl"))
            (tmp_path / "spec.json").write_text(spec.to_json())
            command = [sys.executable, "-m", "rlhf.rollout.worker", str(tmp_path / "spec.json")]
            variables = os.environ | {"PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1"}
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
            outside.process = stack.enter_context(subprocess.Popen(command, env=variables, **pipes))
            stack.callback(outside.process.terminate)
            outside.url = outside.process.stdout.readline().split()[-1]
            ask(urls=[outside.url], token="another")(scaling)

        def with_its_token(scaling: Scaling) -> None:
            ask.heard(scaling)
            ask(urls=[outside.url], token="secret")(scaling)

        def leave(scaling: Scaling) -> None:
            ask.heard(scaling)
            ask(workers=1)(scaling)

        changed = train("transfer=disk", name="changed", before={2: start, 3: with_its_token, 5: leave, 6: ask.heard})
        assert outside.process.poll() is None, "it is not the run's to end"
    refused, came, left = ask.lines
    assert refused.startswith(f"1 worker now, as before; joining failed: worker 1 ({outside.url}): status: ")
    assert refused.endswith("(status 401)")
    assert (came, left) == ("2 workers now, 1 before", "1 worker now, 2 before")
    assert numbers(changed) == numbers(plain)
    served = (tmp_path / "joined/worker-9.jsonl").read_text()
    assert '"op": "serve"' in served and "secret" not in "".join(map(str, changed.rglob("*scale*")))


@pytest.mark.slow
@pytest.mark.lag(1)
def test_workers_come_and_go_while_samples_are_drawn_ahead(train):
    ahead, ask = ("rollout.ahead.lag=1", "algo.correction=tis"), Asking()
    before = {2: ask(workers=3), 4: ask(workers=1), 5: ask.heard}
    changed = train(*ahead, name="changed", before=before)
    assert ask.lines == ["1 worker now, 3 before"]
    assert events(changed, "serve", of="worker-2") and worker_processes() == []
    assert numbers(changed) == numbers(train(*ahead, name="undisturbed"))


@pytest.mark.slow
@pytest.mark.lag(2)
@pytest.mark.parametrize("in_flight", ["keep", "wait"])
def test_workers_come_and_go_while_a_queue_is_filled_and_no_prompt_is_lost_or_drawn_twice(train, in_flight):
    free = ("rollout.ahead.order=free", "rollout.ahead.lag=2", "algo.correction=tis", f"rollout.in_flight={in_flight}")
    ask = Asking()
    before = {2: ask(workers=3), 5: ask(workers=1)}
    changed = train(*free, "steps=9", name="changed", before=before)
    assert [each["op"] for each in events(changed, "join", "leave")] == ["join", "join", "leave", "leave"]
    assert events(changed, "serve", of="worker-1") and events(changed, "serve", of="worker-2")
    plain = train(*free, "steps=9", name="undisturbed")
    learned, undisturbed = (
        sorted(seed for event in events(folder, "consume") for seed in event["seeds"]) for folder in (changed, plain)
    )
    assert learned == undisturbed and len(set(learned)) == 9 * 4 and worker_processes() == []


@pytest.mark.slow
def test_the_command_changes_a_run_of_another_process_and_nothing_is_left_of_either(tmp_path):
    shared = set(os.listdir("/dev/shm"))
    small = [each for each in SMALL if not each.startswith(("steps=", "evaluate_every=", "checkpoint."))]
    line = [*small, "steps=100000", "evaluate_every=100000", "checkpoint.every=0", "hydra.run.dir=run"]
    variables = os.environ | {"PYTHONPATH": str(SOURCE)}
    with subprocess.Popen([sys.executable, "-m", "rlhf.train", *line], cwd=tmp_path, env=variables) as training:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            for workers in (2, 1):
                command = [sys.executable, "-m", "rlhf.scale", "run", str(workers)]
                done = subprocess.run(
                    command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=90, check=False
                )
                assert (done.returncode, done.stderr) == (0, "")
                assert done.stdout.splitlines()[-1].startswith(f"{workers} worker")
                assert sum("rlhf.rollout.worker" in line for line in living_in(tmp_path)) == workers
        finally:
            training.send_signal(signal.SIGTERM)
            training.wait(60)
    assert training.returncode == 143 and living_in(tmp_path) == []
    assert left_in_shared_memory(shared, 5) == set() and not list((tmp_path / "run").glob("*scale*"))
