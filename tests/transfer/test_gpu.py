"""Weights that move between processes on GPUs; tests/gpu/run_all.py runs these with all else that needs one."""

import json
import os
import secrets
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import torch
from gpu_trainer import SENDER, train, weights_of
from worker_process import Float8Model, OddModel, PlainModel

from transfer import make_transfer
from transfer.agreement import wire
from transfer.agreement.journal import Journal
from transfer.agreement.manifest import Manifest
from transfer.config import InFlight, IpcConfig, Staging, Take, Verify
from transfer.memory.digest import digest_of
from transfer.trainer.senders.http import HttpSender
from transfer.worker.plain_worker import PlainSpec
from transfer.worker.process import WorkerProcess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
DEVICE = "cuda"
MIB = 2**20
KIB = 2**10
WAYS = {
    "arena view": IpcConfig(sender=SENDER),
    "arena copy": IpcConfig(sender=SENDER, take=Take.copy),
    "arena copy full": IpcConfig(sender=SENDER, take=Take.copy, verify=Verify.full),
    "arena copy off": IpcConfig(sender=SENDER, take=Take.copy, verify=Verify.off),
    "live copy": IpcConfig(sender=SENDER, staging=Staging.live, take=Take.copy),
    "live copy off": IpcConfig(sender=SENDER, staging=Staging.live, take=Take.copy, verify=Verify.off),
    "live view": IpcConfig(sender=SENDER, staging=Staging.live, take=Take.view),
    "live view off": IpcConfig(sender=SENDER, staging=Staging.live, take=Take.view, verify=Verify.off),
}
COPIES = {name: config for name, config in WAYS.items() if config.take is Take.copy}


class Worker:
    """A worker process on a GPU, and the way to talk to it."""

    def __init__(self, process, url, sender):
        self.process, self.url, self.sender = process, url, sender

    def holds(self):
        """Version and digest of what it serves."""
        return self.sender.call("completions", {})


@contextmanager
def workers(folder, endpoint, manifest, devices=(DEVICE,), token="", restarts=0):
    """A worker process on each of these devices."""
    with ExitStack() as stack:
        started = []
        for index, device in enumerate(devices):
            journal = folder / "journal" / f"worker-{index}.jsonl"
            spec = PlainSpec(
                manifest=manifest.to_json(), endpoint=dict(endpoint), device=device, token=token, journal=str(journal)
            )
            log = folder / f"worker-{index}.log"
            worker = WorkerProcess(f"worker {index}", "transfer.worker.plain_worker", spec.to_json(), log, restarts)
            started.append(stack.enter_context(worker))
        found = []
        for process in started:
            url = f"http://127.0.0.1:{process.port(time.monotonic() + 60)}"
            found.append(Worker(process, url, stack.enter_context(closing(sender_to(process, url, token)))))
        yield found


def sender_to(process, url, token):
    def again():
        if not process.restarted():
            return None
        return f"http://127.0.0.1:{process.port(time.monotonic() + 60)}"

    return HttpSender(url, token, process.name, 20.0, again)


@contextmanager
def opened(config, folder, weights, devices=(DEVICE,), dtype=None, restarts=0):
    """An open session and its worker processes."""
    with (
        closing(Journal(folder / "journal" / "trainer.jsonl")) as journal,
        make_transfer(config, folder, InFlight.wait, journal) as transfer,
        workers(
            folder, transfer.endpoint, Manifest.of(weights, dtype), devices, secrets.token_hex(16), restarts
        ) as them,
    ):
        transfer.open(weights, [worker.sender for worker in them])
        yield transfer, them


def on_gpu(model, device=DEVICE):
    """The weights of a module on the GPU: the tensors themselves."""
    return model.to(device).state_dict(keep_vars=True)


def expected(weights, dtype=None):
    """The digest of the weights, in the order of their manifest, as they travel."""
    entries = Manifest.of(weights, dtype).entries
    return digest_of(weights[entry.name].detach().to(entry.torch_dtype) for entry in entries)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", [OddModel, Float8Model, PlainModel])
def test_every_byte_arrives_in_two_other_processes(way, model, tmp_path):
    weights = on_gpu(model(seed=0))
    with opened(WAYS[way], tmp_path, weights, devices=(DEVICE, DEVICE)) as (transfer, them):
        for version in range(4):
            transfer.withdraw()
            with torch.no_grad():
                for name, tensor in model(seed=version).state_dict().items():
                    weights[name].copy_(tensor)
            assert transfer.push(weights) == version
            assert [worker.holds() for worker in them] == [{"version": version, "digest": expected(weights)}] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_while_they_are_packed(dtype, tmp_path):
    weights = on_gpu(PlainModel(seed=0, hidden=1001))
    with opened(WAYS["arena view"], tmp_path, weights, dtype=dtype) as (transfer, [worker]):
        for version in range(2):
            assert transfer.push(weights) == version
            assert worker.holds()["digest"] == expected(weights, dtype)


def test_weights_that_are_replaced_by_other_tensors_are_found(tmp_path):
    with opened(WAYS["arena view"], tmp_path, on_gpu(PlainModel(seed=0))) as (transfer, [worker]):
        for version in range(4):
            weights = on_gpu(PlainModel(seed=version))
            assert transfer.push(weights) == version
            assert worker.holds()["digest"] == expected(weights)


@pytest.mark.parametrize("way", ["arena copy", "arena copy off", "live copy"])
def test_a_trainer_on_the_cpu_feeds_a_worker_on_the_gpu(way, tmp_path):
    weights = weights_of(1)
    with opened(WAYS[way], tmp_path, weights) as (transfer, [worker]):
        for version in range(2):
            train(weights)
            assert transfer.push(weights) == version
            assert worker.holds()["digest"] == digest_of(weights.values(), like="sums:")


@pytest.mark.parametrize("way", ["arena view", "arena copy"])
def test_a_tensor_that_the_trainer_keeps_on_the_cpu_arrives_with_the_others(way, tmp_path):
    weights = weights_of(1, DEVICE) | {"w9": torch.arange(1001.0)}
    with opened(WAYS[way], tmp_path, weights) as (transfer, [worker]):
        for version in range(2):
            weights["w9"].add_(1)
            assert transfer.push(weights) == version
            on_gpu = {name: tensor.to(DEVICE) for name, tensor in weights.items()}
            assert worker.holds()["digest"] == expected(on_gpu)


@pytest.mark.parametrize("way", ["arena view", "arena copy", "live copy"])
def test_values_that_are_not_finite_are_refused_and_nothing_changes(way, tmp_path):
    weights = weights_of(1, DEVICE)
    with opened(WAYS[way], tmp_path, weights) as (transfer, [worker]):
        transfer.push(weights)
        before = worker.holds()
        with torch.no_grad():
            weights["w3"][7] = float("nan")
        with pytest.raises(wire.TransferError, match="w3 has values that are not finite"):
            transfer.push(weights)
        assert worker.holds() == before
        with torch.no_grad():
            weights["w3"][7] = 7
        transfer.push(weights)
        assert worker.holds()["digest"] == expected(weights)


@pytest.mark.parametrize("way", ["live view", "live view off"])
def test_live_weights_that_are_not_finite_are_found_by_the_trainer_as_workers_only_view_them(way, tmp_path):
    weights = weights_of(1, DEVICE)
    with opened(WAYS[way], tmp_path, weights) as (transfer, [worker]):
        transfer.push(weights)
        transfer.withdraw()
        with torch.no_grad():
            weights["w3"][7] = float("nan")
        with pytest.raises(wire.TransferError, match="w3 has values that are not finite; nothing was sent"):
            transfer.push(weights)
        with pytest.raises(wire.RemoteError, match="quarantined"):
            worker.holds()
        with torch.no_grad():
            weights["w3"][7] = 7
        transfer.push(weights)
        assert worker.holds()["digest"] == expected(weights)


def test_without_digests_a_worker_that_copies_live_weights_finds_what_is_not_finite_and_serves_nothing(tmp_path):
    weights = weights_of(1, DEVICE)
    with opened(WAYS["live copy off"], tmp_path, weights) as (transfer, [worker]):
        transfer.push(weights)
        with torch.no_grad():
            weights["w3"][7] = float("inf")
        with pytest.raises(wire.TransferError, match="w3 has values that are not finite"):
            transfer.push(weights)
        with pytest.raises(wire.RemoteError, match="quarantined"):
            worker.holds()
        with torch.no_grad():
            weights["w3"][7] = 7
        transfer.push(weights)
        assert worker.holds()["digest"] == expected(weights)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.timeout(400)
def test_gpu_memory_stays_flat_over_a_thousand_updates(way, tmp_path):
    weights = weights_of(16, DEVICE)
    with opened(WAYS[way], tmp_path, weights) as (transfer, [worker]):
        for _ in range(50):
            transfer.withdraw()
            transfer.push(weights)
        torch.cuda.synchronize()
        free, _ = torch.cuda.mem_get_info()
        for _ in range(1000):
            transfer.withdraw()
            transfer.push(weights)
        grown = free - torch.cuda.mem_get_info()[0]
        assert worker.holds()["digest"] == expected(weights)
    assert grown <= 1000 * KIB, f"{grown} bytes in 1000 updates"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", WAYS)
def test_a_worker_that_is_killed_while_it_reads_is_started_again_and_gets_the_weights(way, tmp_path):
    weights = weights_of(2048, DEVICE)
    with opened(WAYS[way], tmp_path, weights, devices=(DEVICE, DEVICE), restarts=1) as (transfer, them):
        transfer.push(weights)
        kill = f"import os, time; time.sleep(1.0); os.kill({them[0].process.pid}, 9)"
        with subprocess.Popen([sys.executable, "-c", kill]) as killer:
            while killer.poll() is None:
                transfer.withdraw()
                train(weights)
                transfer.push(weights)
        transfer.withdraw()
        train(weights)
        transfer.push(weights)
        assert them[0].holds() == them[1].holds()
        assert them[0].holds()["digest"] == expected(weights)


@contextmanager
def trainer(folder, way, worker, token, mib, pushes):
    """The process of gpu_trainer.py."""
    config = WAYS[way]
    arguments = [str(folder), config.staging.value, config.take.value, DEVICE, str(mib), str(pushes), worker.url]
    command = [sys.executable, str(Path(__file__).with_name("gpu_trainer.py")), *arguments]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    variables = os.environ | {"PYTHONPATH": paths, wire.TOKEN_VARIABLE: token}
    with (folder / "trainer.log").open("a") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=variables, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def endpoint_for(way):
    """What a worker must know of a trainer that does not run yet; on GPUs that is all."""
    config = WAYS[way]
    return {"backend": "ipc", "staging": config.staging.value, "take": config.take.value, "socket": ""}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", ["arena view", "arena copy", "live copy", "live view"])
def test_a_worker_whose_trainer_is_killed_serves_on_and_the_next_trainer_takes_it_over(way, tmp_path):
    token, manifest = secrets.token_hex(16), Manifest.of(weights_of(2048))
    with workers(tmp_path, endpoint_for(way), manifest, token=token) as [worker]:
        for after in (0.0, 0.013, 0.029):
            with trainer(tmp_path, way, worker, token, 2048, 10_000) as process:
                told = [json.loads(process.stdout.readline()) for _ in range(3)]
                time.sleep(after)
                process.kill()
                told += [json.loads(line) for line in process.stdout]
            status = worker.sender.call("status", {})
            if status["version"] is None:  # the weights were being copied, or were withdrawn
                assert status["phase"] == "quarantined" and way != "arena view"
            else:
                held = worker.holds()
                assert held["version"] in (told[-1]["version"], told[-1]["version"] + 1)
                assert held == told[-1] or held["version"] > told[-1]["version"]
        with trainer(tmp_path, way, worker, token, 2048, 2) as process:
            told = [json.loads(line) for line in process.stdout]
        assert worker.holds() == told[-1]


@pytest.mark.parametrize("way", ["arena view", "live copy", "live view"])
def test_segments_that_can_grow_do_not_matter(way, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    token, manifest = secrets.token_hex(16), Manifest.of(weights_of(64))
    with workers(tmp_path, endpoint_for(way), manifest, token=token) as [worker]:
        with trainer(tmp_path, way, worker, token, 64, 3) as process:
            told = [json.loads(line) for line in process.stdout]
        assert [each["version"] for each in told] == [0, 1, 2]
        assert worker.holds() == told[-1]


@two_gpus
@pytest.mark.parametrize("way", COPIES)
def test_a_receiver_on_another_gpu_reads_across(way, tmp_path):
    weights = on_gpu(OddModel(seed=3), "cuda:0")
    with opened(WAYS[way], tmp_path, weights, devices=("cuda:1", "cuda:0")) as (transfer, them):
        for version in range(3):
            with torch.no_grad():
                weights["scale"].add_(1)
            transfer.push(weights)
            assert [worker.holds() for worker in them] == [{"version": version, "digest": expected(weights)}] * 2


@two_gpus
@pytest.mark.parametrize("way", COPIES)
def test_large_tensors_reach_another_gpu_in_chunks_and_what_is_not_finite_is_found_in_them(way, tmp_path):
    sizes = {"a": 300 * MIB + 3, "b": 1001, "c": 2 * MIB + 1}
    weights = {name: torch.randn(size, device="cuda:0", dtype=torch.bfloat16) for name, size in sizes.items()}
    with opened(WAYS[way], tmp_path, weights, devices=("cuda:1",)) as (transfer, [worker]):
        for version in range(3):
            for each in weights.values():
                each.add_(1)
            transfer.push(weights)
            assert worker.holds() == {"version": version, "digest": expected(weights)}
        assert "by the copy engine in 3 chunks" in worker.sender.call("status", {})["plan"]
        weights["a"][-5] = float("nan")
        with pytest.raises(wire.TransferError, match="a has values that are not finite"):
            transfer.push(weights)


@two_gpus
@pytest.mark.parametrize("way", ["arena view", "live copy", "live view"])
def test_gpus_are_known_by_their_uuid_whatever_their_order(way, tmp_path, monkeypatch):
    weights = on_gpu(PlainModel(seed=3), "cuda:0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")  # for the worker: this process has seen its devices already
    with opened(WAYS[way], tmp_path, weights, devices=("cuda:1",)) as (transfer, [worker]):
        transfer.push(weights)
        assert worker.holds()["digest"] == expected(weights)


@two_gpus
@pytest.mark.parametrize("way", ["arena view", "live view"])
def test_a_view_from_another_gpu_is_refused_with_the_key_to_change(way, tmp_path):
    weights = on_gpu(PlainModel(seed=3), "cuda:0")
    with (
        pytest.raises(ValueError, match=r"transfer\.take=copy"),
        opened(WAYS[way], tmp_path, weights, devices=("cuda:1",)),
    ):
        pass
