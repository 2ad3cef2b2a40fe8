"""Worker processes come up, and go: with their context, with their parent, and with an error that names them."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import requests

from rlhf.config import HfRolloutConfig
from rlhf.rollout.begun import Begun
from rlhf.rollout.client import RolloutClient
from rlhf.rollout.launch import Workers
from rlhf.rollout.spec import WorkerSpec
from rlhf.types import Prompt
from transfer.agreement.wire import TOKEN_VARIABLE, RemoteError
from transfer.config import DiskConfig, HttpSenderConfig, IpcConfig
from transfer.worker.process import SOURCE, WorkerProcess
from transfer.worker.serve import listening

PROMPTS = [Prompt("x", (3, 4, 5)), Prompt("y", (8,))]
QWEN = {"architecture": {"model_type": "qwen3"}, "endpoint": {"backend": "local"}}


def process_of(spec, folder, index=0):
    return WorkerProcess(f"worker {index}", "rlhf.rollout.worker", spec.to_json(), folder / f"worker-{index}.log")


def gone(process, within_s=20):
    try:
        process.wait(within_s)
    except psutil.TimeoutExpired:
        return False
    return True


def started_since(before):
    """Worker processes below this one that were not there before."""
    now = psutil.Process().children(recursive=True)
    return [child for child in now if child not in before and "rlhf.rollout.worker" in child.cmdline()]


def test_workers_serve_once_fed_are_named_when_they_die_and_are_gone_afterwards(launch, model, tokenizer):
    before = psutil.Process().children(recursive=True)
    with launch(IpcConfig(sender=HttpSenderConfig()), workers=2) as fleet:
        for sender in fleet.workers.senders():
            with pytest.raises(RemoteError, match="no weights to serve") as empty:
                sender.call("completions", {"prompt": [[3]]})
            assert empty.value.status == 503
        senders = fleet.feed(model)
        processes = started_since(before)
        assert len(processes) == 2
        client = RolloutClient(senders, tokenizer, HfRolloutConfig(max_new_tokens=4))
        assert len(client.sample(PROMPTS, n=1, temperature=1.0, seed=0).texts) == 2
        port = senders[1].name.rpartition(":")[2].rstrip(")")
        victim = next(p for p in processes if any(c.laddr.port == int(port) for c in p.net_connections()))
        victim.send_signal(signal.SIGKILL)
        with pytest.raises(RemoteError, match=r"worker 1 .*completions") as error:
            client.sample(PROMPTS, n=1, temperature=1.0, seed=0)
        assert error.value.status == 0
        (survivor,) = [process for process in processes if process != victim]
        survivor.send_signal(signal.SIGSTOP)  # will not hear a polite request to end
    assert gone(survivor) and gone(victim)
    assert started_since(before) == []


def test_a_worker_that_cannot_start_is_named_with_the_end_of_its_log(tmp_path):
    spec = replace(WorkerSpec(**QWEN), architecture={"model_type": "no_such_model"})
    with (
        process_of(spec, tmp_path, 3) as process,
        pytest.raises(RuntimeError, match=r"worker 3 died while it started(?s:.*)no_such_model"),
    ):
        process.port(time.monotonic() + 60)


def test_a_worker_that_is_dead_before_it_is_told_anything_is_named_with_the_end_of_its_log(tmp_path, monkeypatch):
    class AwaitedDead(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.wait(60)

    monkeypatch.setattr("transfer.worker.process.subprocess.Popen", AwaitedDead)
    with (
        WorkerProcess("worker 3", "no.such.module", "{}", tmp_path / "log") as process,
        pytest.raises(RuntimeError, match=r"worker 3 died while it started(?s:.*)No module named"),
    ):
        process.port(time.monotonic() + 60)


def test_a_worker_that_is_too_slow_to_start_is_named_with_the_key_to_change(tmp_path):
    with (
        process_of(WorkerSpec(**QWEN), tmp_path) as process,
        pytest.raises(RuntimeError, match=r"worker 0 did not come up within transfer\.sender\.start_timeout_s"),
    ):
        process.port(time.monotonic())


PARENT = textwrap.dedent("""
    import os, sys, time
    from pathlib import Path
    from rlhf.rollout.spec import WorkerSpec
    from transfer.worker.process import WorkerProcess

    def main():
        settings = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        spec = WorkerSpec(architecture={"model_type": "qwen3", **settings}, endpoint={"backend": "local"}, token="t")
        with WorkerProcess("worker 0", "rlhf.rollout.worker", spec.to_json(), Path(sys.argv[1]) / "log") as worker:
            port = worker.port(time.monotonic() + 60)
            if sys.argv[2] == "with a child that holds the pipes" and os.fork() == 0:
                time.sleep(60)
            print(port, flush=True)
            time.sleep(60)

    main()
""")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["alone", "with a child that holds the pipes"])
def test_a_worker_does_not_outlive_a_parent_that_is_killed(tmp_path, case):
    command = [sys.executable, "-c", PARENT, str(tmp_path), case]
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        try:
            port = int(parent.stdout.readline())
            assert requests.get(f"http://127.0.0.1:{port}/health", timeout=20).status_code == 200
            family = psutil.Process(parent.pid).children(recursive=True)
            (worker,) = [child for child in family if "rlhf.rollout.worker" in child.cmdline()]
            parent.kill()
            assert gone(worker)
        finally:
            parent.kill()
            for child in family:
                if child.is_running():
                    child.kill()


@pytest.mark.slow
def test_a_worker_that_stands_alone_is_driven_by_its_url(launch, model, tokenizer, tmp_path, monkeypatch):
    shared = DiskConfig(sender=HttpSenderConfig(), path=str(tmp_path / "weights"))
    file = tmp_path / "spec.json"
    with launch(shared) as fleet:
        file.write_text(fleet.spec.to_json())
    command = [sys.executable, "-m", "rlhf.rollout.worker", str(file)]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment
    ) as alone:
        try:
            url = alone.stdout.readline().split()[-1]
            monkeypatch.setenv(TOKEN_VARIABLE, fleet.spec.token)
            by_url = replace(shared, sender=HttpSenderConfig(url=[url]))
            with launch(by_url) as driven:
                client = RolloutClient(driven.feed(model), tokenizer, HfRolloutConfig(max_new_tokens=4))
                assert len(client.sample(PROMPTS, n=2, temperature=1.0, seed=0).texts) == 4
            assert alone.poll() is None  # not ours to end
        finally:
            alone.terminate()
    assert alone.returncode == -signal.SIGTERM


def test_another_number_of_workers_than_of_urls_is_a_mistake(launch):
    sender = HttpSenderConfig(url=["http://127.0.0.1:1", "http://127.0.0.1:2"])
    with (
        pytest.raises(ValueError, match=r"rollout\.workers must be as many"),
        launch(DiskConfig(sender=sender), workers=3),
    ):
        pass


def test_binding_beyond_loopback_without_a_token_refuses_to_start():
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", ""):
        with pytest.raises(ValueError, match="needs a token"):
            listening(WorkerSpec(**QWEN, host=host))
    with listening(WorkerSpec(**QWEN)) as loopback, listening(WorkerSpec(**QWEN, host="0.0.0.0", token="t")) as public:
        assert loopback.getsockname()[0] == "127.0.0.1"
        assert public.getsockname()[0] == "0.0.0.0"


def test_the_token_is_on_no_command_line_and_in_no_log(http_fleet):
    token = http_fleet.spec.token
    workers = [p for p in psutil.Process().children() if "rlhf.rollout.worker" in p.cmdline()]
    assert workers
    for worker in workers:
        assert token not in " ".join(worker.cmdline())
        assert token not in " ".join(worker.environ().values())


class Telling:
    """A worker that says how much of a GPU it has taken, or does not answer."""

    def __init__(self, status):
        self.status = status

    def call(self, verb, body, timeout_s):
        if self.status is None:
            raise RemoteError("worker", verb, 0, "no answer within 1 s")
        return self.status

    def close(self):
        pass


def test_workers_are_asked_for_their_gpu_memory_while_they_are_there(compose_run, tmp_path, monkeypatch):
    senders = [Telling({"gpu_memory_mib": 7.0}), Telling({}), Telling(None), Telling({"gpu_memory_mib": 5.0})]
    workers = Workers(WorkerSpec(**QWEN), compose_run("rollout.workers=4"), tmp_path, None)
    monkeypatch.setattr(workers, "_start", lambda: nullcontext(lambda index: Begun(index, lambda _: senders[index])))
    with workers:
        assert workers.gpu_memory() == {}, "they are not up yet"
        workers.senders()
        assert workers.gpu_memory() == {"gpu_memory_mib/worker-0": 7.0, "gpu_memory_mib/worker-3": 5.0}
    assert workers.gpu_memory() == {}


def test_workers_have_the_first_number_that_is_free_and_the_gpu_that_so_many_workers_would_have(
    compose_run, tmp_path, monkeypatch
):
    asked = []

    def gpus(policy, config):
        asked.append(config.rollout.workers)
        return [str(index % 3) for index in range(config.rollout.workers)]

    config = compose_run("rollout.workers=2", "transfer.take=copy")
    workers, told = Workers(WorkerSpec(**QWEN, visible=["0", "1"]), config, tmp_path, None), []
    monkeypatch.setattr("rlhf.rollout.launch.gpus_of_workers", gpus)
    monkeypatch.setattr(workers, "_start", lambda: nullcontext(begin))

    def begin(index):
        told.append(workers._told(index))
        return Begun(index, lambda _: Telling({}))

    with workers:
        second = workers._begun[1]
        workers.begin()
        workers.end(second)
        workers.begin()
        workers.begin()
    assert [Path(spec.journal).stem for spec in told] == [f"worker-{index}" for index in (0, 1, 2, 1, 3)]
    assert [spec.visible for spec in told] == [["0"], ["1"], ["2"], ["1"], ["0"]]
    assert asked == [3, 4] and config.rollout.workers == 2


EAGER = "rollout.engine_args={enforce_eager: true}"


@pytest.mark.parametrize(
    ("overrides", "device", "line"),
    [
        ([], "cuda", "waiting for 1 worker: vLLM loads, compiles and captures CUDA graphs; its log: run/worker-0.log"),
        (["rollout.workers=2"], "cpu", "waiting for 2 workers: vLLM loads; its log: run/worker-0.log"),
        (
            ["rollout.engine_args={enforce_eager: true}", "transfer/sender=ray"],
            "cuda",
            "waiting for 1 worker: vLLM loads",
        ),
        (["transfer.sender.url=[http://127.0.0.1:8000]"], "cuda", None),
    ],
)
def test_what_takes_long_until_workers_are_up_is_said_with_its_log(compose_run, overrides, device, line):
    config = compose_run("rollout=vllm", "transfer.take=copy", *overrides)
    assert Workers(WorkerSpec(**QWEN, device=device), config, Path("run"), None).awaited() == line
    assert Workers(WorkerSpec(**QWEN), compose_run(), Path("run"), None).awaited() is None
