"""Traces of steps: of the trainer and of each worker, small, and no number of the run depends on them."""

from __future__ import annotations

import gzip
import json
import threading
from pathlib import Path

import pytest
import torch

from rlhf.monitor.profiler import Profiler
from rlhf.monitor.traces import Trace, Traces, compress, profiler
from rlhf.run import run
from transfer.agreement.wire import Refused, RemoteError

SMALL = ("experiment=smoke", "logger=jsonl", "sft.steps=2", "steps=3", "task.held_out=8", "task.prompts=64")
TIMES = ("seconds", "tokens_per_second", "transfer/seconds", "transfer/write_seconds")


def events(path: Path) -> list[dict]:
    """What a trace holds."""
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def numbers(folder: Path) -> list[dict[str, float]]:
    """The run's metrics but for times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


class Busy:
    """A thread that computes, as a worker's that samples."""

    def __enter__(self):
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._compute)
        self._thread.start()

    def _compute(self):
        x = torch.ones(8, 8)
        while not self._end.wait(0.001):
            x = torch.tanh(x)

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()


def test_a_step_of_trainer_and_worker_is_traced_and_the_numbers_are_those_of_any_run(compose_run, tmp_path):
    run(compose_run(*SMALL, "profile.steps=[2]"), tmp_path / "traced")
    run(compose_run(*SMALL), tmp_path / "plain")
    assert numbers(tmp_path / "traced") == numbers(tmp_path / "plain")
    traces = sorted((tmp_path / "traced" / "profile").iterdir())
    assert [trace.name for trace in traces] == ["step-2-worker-0.json.gz", "step-2.json.gz"]
    assert all(trace.stat().st_size < 2_000_000 for trace in traces)
    worker, trainer = ({str(event.get("name")).lower() for event in events(trace)} for trace in traces)
    assert any("backward" in name for name in trainer) and not any("backward" in name for name in worker)
    assert "aten::linear" in worker, "what it samples with, in another thread than the message's"
    assert not (tmp_path / "plain" / "profile").exists()


@pytest.mark.slow
def test_ray_actors_are_traced_too(compose_run, tmp_path):
    run(compose_run(*SMALL, "profile.steps=[2]", "transfer/sender=ray"), tmp_path)
    names = ["step-2-worker-0.json.gz", "step-2.json.gz"]
    assert [trace.name for trace in sorted((tmp_path / "profile").iterdir())] == names


def test_a_worker_s_trace_ends_after_so_many_seconds_and_says_so(tmp_path):
    path = tmp_path / "profile" / "step-1-worker-0.json.gz"
    with Busy():
        trace = Trace(path, longest_s=0.05)
        while trace.going:
            pass
    assert trace.stop() == "step-1-worker-0.json.gz has the first 0.05 s"
    assert "aten::tanh" in {event.get("name") for event in events(path)}


def traced(raw: Path) -> None:
    """A trace of 3000 operations, as torch writes it."""
    recorded = profiler()
    recorded.start()
    for _ in range(3000):
        torch.tanh(torch.ones(2))
    recorded.stop()
    recorded.export_chrome_trace(str(raw))


def test_a_trace_that_would_be_too_large_keeps_its_beginning(tmp_path):
    raw, whole, cut = tmp_path / "raw", tmp_path / "whole.json.gz", tmp_path / "cut.json.gz"
    traced(raw)
    assert compress(raw, whole, 10**9) == ""
    bound = whole.stat().st_size // 2
    said = compress(raw, cut, bound)
    assert "cut.json.gz has the first" in said and bound // 3 < cut.stat().st_size <= bound
    of_whole, of_cut = events(whole), events(cut)
    assert len(of_whole) / 4 < len(of_cut) < len(of_whole)
    ends = [max(event["ts"] for event in each if event.get("cat") == "cpu_op") for each in (of_cut, of_whole)]
    starts = [min(event["ts"] for event in each if event.get("cat") == "cpu_op") for each in (of_cut, of_whole)]
    assert starts[0] == starts[1] and ends[0] < ends[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.json.gz", "raw", "whole.json.gz"]


def test_a_trace_that_cannot_be_made_small_is_not_written(tmp_path):
    raw = tmp_path / "raw"
    raw.write_text(json.dumps({"traceEvents": [{"name": str(n)} for n in range(5000)]}))
    assert compress(raw, tmp_path / "cut.json.gz", 100).startswith("cut.json.gz would have more than")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_one_trace_goes_on_at_a_time_and_only_where_there_is_a_folder(tmp_path):
    with pytest.raises(Refused, match="no run's folder"):
        Traces(None).start(1)
    traces = Traces(tmp_path / "worker-0.log")
    with pytest.raises(Refused, match="no trace was begun"):
        traces.stop()
    traces.start(1)
    with pytest.raises(Refused, match="stop it first"):
        traces.start(2)
    assert traces.stop() == ""
    traces.start(2)
    (tmp_path / "profile" / "step-2-worker-0.json.gz").mkdir()
    with pytest.raises(Refused, match="the trace is lost: IsADirectoryError"):
        traces.stop()
    traces.start(3)
    traces.stop()
    assert (tmp_path / "profile" / "step-3-worker-0.json.gz").is_file()


class FakeWorker:
    """Notes what it is asked; refuses, if it has a reason."""

    def __init__(self, refuses: str = "") -> None:
        self.name, self.refuses, self.asked = "worker 0", refuses, []

    def call(self, verb, body, timeout_s=None):
        if self.refuses:
            raise RemoteError(self.name, verb, 404, self.refuses)
        self.asked.append((verb, body))
        return {"is_profiling": verb == "start_profile", "said": "it is cut"} if verb == "stop_profile" else {}


def test_a_worker_that_cannot_be_traced_is_one_warning_and_the_others_are(tmp_path):
    said = []
    profiler, plain, stock = Profiler([2], tmp_path, said.append), FakeWorker(), FakeWorker("Not Found")
    profiler.workers = [plain, stock]
    for step in (1, 2, 3):
        profiler.begin(step)
        profiler.begin(step)
        profiler.end(step)
    assert plain.asked == [("start_profile", {"step": 2}), ("stop_profile", {})]
    assert said == ["warning: not traced: worker 0: start_profile: Not Found (status 404)", "it is cut"]
    assert (tmp_path / "profile" / "step-2.json.gz").exists()


def test_a_disk_that_takes_no_trace_is_a_warning(tmp_path):
    said = []
    profiler = Profiler([1], tmp_path, said.append)
    (tmp_path / "profile").write_text("")
    profiler.begin(1)
    profiler.end(1)
    assert said[0].startswith("warning: step 1 of the trainer is not traced: ")
