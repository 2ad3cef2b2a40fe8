"""What NVML says of a GPU, to whom it is attributed, and that a run without NVML, or without a GPU, goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from rlhf.monitor import heartbeat
from rlhf.monitor.gpu import Gpus, found, gpu_peak
from rlhf.monitor.heartbeat import Heartbeat, Pulse
from rlhf.reports.summary import hardware, summarise

MIB = 2**20


class FakeNvml:
    """Two GPUs, of which the first is busy for a quarter of the time; `used` are MiB by GPU and process."""

    def __init__(self, used=({}, {}), broken: bool = False) -> None:
        self.used, self.broken = used, broken

    def nvmlDeviceGetCount(self):
        return len(self.used)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid, usedGpuMemory=mib * MIB) for pid, mib in self.used[handle].items()]

    def nvmlDeviceGetUtilizationRates(self, handle):
        if self.broken:
            raise RuntimeError("Not Supported")
        return SimpleNamespace(gpu=25)


def gpus(nvml) -> Gpus:
    return Gpus(lambda: (nvml, 0))


def test_without_a_gpu_or_nvml_nothing_is_said():
    def missing():
        raise ImportError

    for none in (Gpus(), Gpus(missing), gpus(FakeNvml(broken=True))):
        assert none.busy() is None and none.memory() == {}
    assert gpu_peak() is None


def test_nvml_is_looked_for_until_the_process_uses_a_gpu_and_once_if_it_is_not_there():
    answers = iter([None, (FakeNvml(), 0)])
    later = Gpus(lambda: next(answers))
    assert [later.busy(), later.busy(), later.busy()] == [None, 0.25, 0.25]


def test_memory_is_by_process_over_all_gpus():
    assert gpus(FakeNvml(({7: 100, 8: 50}, {8: 25}))).memory() == {7: 100.0, 8: 75.0}


def test_how_busy_the_gpu_is_counts_for_the_phase_that_has_gone_on_and_is_told_once(monkeypatch):
    monkeypatch.setattr(heartbeat, "SETTLED_S", 0.02)
    pulse = Pulse()
    pulse.saw(0.9)
    with pulse.within("sample"):
        pulse.saw(0.0)  # of what was before
        time.sleep(0.03)
        pulse.saw(0.5)
        pulse.saw(1.0)
    with pulse.within("reward"):
        pulse.saw(0.9)
    assert pulse.idle(["sample", "reward"]) == {"sample": 0.25}
    assert pulse.idle(["sample"]) == {}


def test_the_heartbeat_samples_several_times_a_second_and_writes_the_status_less_often(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "SETTLED_S", 0.0)
    monkeypatch.setattr(heartbeat, "SAMPLE_S", 0.01)
    pulse = Pulse()
    heart = Heartbeat(tmp_path, pulse, print, every_s=1.0)
    heart.gpus, looks = gpus(FakeNvml()), []
    monkeypatch.setattr(heart, "look", lambda: looks.append(time.monotonic()))
    with heart, pulse.within("learn"):
        deadline = time.monotonic() + 30
        while not looks and time.monotonic() < deadline:
            time.sleep(0.01)
        samples = len(pulse.busy["learn"])
        assert looks and samples > 10 * len(looks)  # a hundred a look, where nothing else runs
    assert pulse.idle(["learn"]) == {"learn": 0.75}


@pytest.fixture
def worker(tmp_path):
    """A process that looks like a worker whose log is worker-1.log, with a process of its engine."""
    inner = "import sys; print('up', flush=True); sys.stdin.read()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])  # rlhf.rollout.worker"
    with open(tmp_path / "worker-1.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    assert process.stdout.readline() == b"up\n"
    yield process
    process.communicate(b"")


def test_the_processes_of_a_worker_are_added_up_under_its_name(tmp_path, worker, monkeypatch):
    monkeypatch.setattr(heartbeat, "gpu_peak", lambda reserved: 10.0)
    heart = Heartbeat(tmp_path, Pulse(), print)
    of_engine = psutil.Process(worker.pid).children()[0].pid
    heart.gpus = gpus(FakeNvml(({os.getpid(): 12, worker.pid: 100, of_engine: 50, 1: 999}, {of_engine: 25})))
    heart.look()
    told = {name: mib for name, mib in heart.peaks.items() if name.startswith("gpu_")}
    assert told == {"gpu_memory_mib/trainer": 10.0, "gpu_memory_mib/worker-1": 175.0}


def test_where_nvml_knows_other_process_ids_the_workers_are_asked_and_their_most_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "gpu_peak", lambda reserved: 10.0)
    heart = Heartbeat(tmp_path, Pulse(), print)
    heart.gpus, answers = gpus(FakeNvml(({1: 999}, {}))), iter([70.0, 60.0])
    heart.ask = lambda: {"gpu_memory_mib/worker-0": next(answers)}
    heart.look()
    heart.look()
    assert heart.peaks["gpu_memory_mib/worker-0"] == 70.0


def test_on_a_cpu_no_worker_is_asked(tmp_path):
    heart = Heartbeat(tmp_path, Pulse(), print)
    heart.ask = lambda: 1 / 0
    heart.look()
    assert not [name for name in heart.peaks if name.startswith("gpu_")]


def test_the_summary_tells_medians_of_mfu_and_means_of_idleness_in_words():
    common = {"seconds/step": 1.0, "seconds/transfer": 0.1, "tokens_per_second": 5.0, "tokens_per_second/sampled": 9.0}
    rows = [
        {"step": step, **common, "train/mfu": mfu, "gpu_idle/sample": idle, "gpu_idle/learn": 0.02}
        for step, mfu, idle in ((1, 0.1, 0.5), (2, 0.4, 0.1), (3, 0.3, 0.0))
    ]
    summary = summarise(rows)
    assert (summary["mfu"], summary["tokens_per_second_sampled"]) == (0.3, 9.0)
    assert summary["gpu_idle/sample"] == pytest.approx(0.2) and "tokens_per_second_learned" not in summary
    assert hardware(summary | {"gpu_memory_mib/trainer": 2048.0, "gpu_memory_mib/worker-0": 1024.0}) == {
        "MFU of learning": "30.0%",
        "GPU idle while learning": "2%",
        "GPU idle while sampling": "20%",
        "GPU memory, trainer": "2.0 GiB",
        "GPU memory, worker-0": "1.0 GiB",
    }


def test_who_looks_at_memory_does_not_settle_which_gpus_this_process_may_see(monkeypatch):
    def settled():
        raise AssertionError("CUDA reads CUDA_VISIBLE_DEVICES now, and a Ray says later which GPUs a run has")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("is_available", "device_count", "current_device"):
        monkeypatch.setattr(torch.cuda, name, settled)
    assert gpu_peak() is None and found() is None
