"""What a run tells while it goes on: where it is, that a phase takes long, its stacks, its memory, traces of steps."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.monitor.heartbeat import Heartbeat, Pulse, dump_stacks, workers_of
from rlhf.run import run
from transfer.worker.stacks import VARIABLE

WAIT_S = 20.0


def wait_for(there) -> None:
    deadline = time.monotonic() + WAIT_S
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text()) if (folder / "status.json").exists() else {}


def test_the_status_says_where_the_run_is_and_in_the_end_how_it_ended(tmp_path):
    pulse = Pulse()
    with pytest.raises(KeyError), Heartbeat(tmp_path, pulse, print, every_s=0.01):
        pulse.at("grpo", 3, 6, {"reward": 0.5})
        with pulse.within("sample"):
            wait_for(lambda: status(tmp_path).get("phase") == "sample")
        told = status(tmp_path)
        assert (told["state"], told["stage"], told["done"], told["of"]) == ("running", "grpo", 3, 6)
        assert told["numbers"] == {"reward": 0.5} and told["pid"] == os.getpid() and told["memory_mib/trainer"] > 10
        raise KeyError
    assert status(tmp_path)["state"] == "failed"


def test_a_phase_that_takes_longer_than_usual_is_said_and_one_that_does_not_end_shows_its_stacks(tmp_path):
    pulse, said = Pulse(), []
    heart = Heartbeat(tmp_path, pulse, said.append, every_s=0.01)
    heart.long_s, heart.stacks_s = 0.05, 0.3
    pulse.taken["learn"].append(0.002)
    with heart, pulse.within("learn"):
        wait_for(lambda: (tmp_path / "stacks.txt").exists() and len(said) > 2)
    assert "learn has taken 0 s so far, usually 0.0 s" in said[0]
    assert "test_a_phase_that_takes_longer" in (tmp_path / "stacks.txt").read_text()
    assert len(said) < 12, "again only when it has doubled"


def test_a_quick_phase_is_never_said(tmp_path):
    pulse, said = Pulse(), []
    pulse.taken["learn"].append(0.0001)
    with Heartbeat(tmp_path, pulse, said.append, every_s=0.01), pulse.within("learn"):
        time.sleep(0.1)
    assert said == []


def test_a_worker_writes_its_stacks_when_it_is_asked_and_goes_on(tmp_path):
    code = (
        "import sys, time; from transfer.worker.stacks import dumps_stacks_when_asked as on\n"
        "on(); print('up', flush=True); sys.stdin.read()  # rlhf.rollout.worker"
    )
    with open(tmp_path / "log", "w") as log:
        worker = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
        assert worker.stdout.readline() == b"up\n" and worker.pid in workers_of(os.getpid())
        dump_stacks(tmp_path / "stacks.txt")
        wait_for(lambda: "Current thread" in (tmp_path / "log").read_text())
        assert worker.poll() is None
        worker.communicate(b"")
    assert worker.returncode == 0


ENGINE = """
import sys
try:
    from transfer.vllm import plugin
    plugin.register()
except ImportError:  # no vLLM is here
    pass
print("up", flush=True)
sys.stdin.read()
"""


def test_what_a_worker_s_engine_has_started_is_asked_and_no_process_that_would_end_by_it(tmp_path):
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ENGINE!r}])  # rlhf.rollout.worker"
    asked = os.environ | {VARIABLE: str(tmp_path / "worker-0.log")}
    others = set(workers_of(os.getpid()))  # of tests that share theirs
    started = [
        subprocess.Popen([sys.executable, "-c", each], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        for each, env in ((code, asked), (code, os.environ), (ENGINE, asked))
    ]
    assert [process.stdout.readline() for process in started] == 3 * [b"up\n"]
    assert len(set(workers_of(os.getpid())) - others) == 4, "two workers with an engine each, and no more"
    dump_stacks(tmp_path / "stacks.txt")
    wait_for(lambda: "Current thread" in (tmp_path / "worker-0.log").read_text())
    assert [process.poll() for process in started] == 3 * [None]
    assert [process.communicate(b"") for process in started] == 3 * [(b"", None)]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert (tmp_path / "worker-0.log").read_text().count("Current thread") == 1


def test_chosen_steps_are_traced_and_memory_is_in_the_summary(compose_run, tmp_path):
    small = (
        "experiment=smoke",
        "transfer=local",
        "logger=jsonl",
        "sft.steps=2",
        "steps=3",
        "task.held_out=8",
        "task.prompts=64",
    )
    summary = run(compose_run(*small, "profile.steps=[2]"), tmp_path)
    (trace,) = (tmp_path / "profile").iterdir()
    told = json.loads(gzip.decompress(trace.read_bytes()))
    names = {str(event.get("name")) for event in told["traceEvents"]}
    assert trace.name == "step-2.json.gz" and any(name.startswith("aten::") for name in names)
    assert any("backward" in name.lower() for name in names), "sampled, learned and handed over"
    assert summary["memory_mib/trainer"] > 100 and status(tmp_path)["state"] == "finished"


def test_steps_to_trace_are_steps_of_the_run(compose_run):
    with pytest.raises(Exception, match=r"profile\.steps must be steps of the run, 1 to 60"):
        compose_run("profile.steps=[61]")
