"""Many updates to a worker process: memory, descriptors and /dev/shm stay as they are."""

import os
import secrets
import time
from contextlib import closing

import psutil
import pytest
import torch
from shared_memory import left_in_shared_memory
from sizes import in_ci, in_full

from transfer import make_transfer
from transfer.agreement.manifest import Manifest
from transfer.config import DiskConfig, HttpSenderConfig, IpcConfig, Staging, Take
from transfer.memory.digest import digest_of
from transfer.trainer.senders.http import HttpSender
from transfer.worker.plain_worker import PlainSpec
from transfer.worker.process import WorkerProcess

SENDER = HttpSenderConfig()
CONFIGS = {
    "arena view": IpcConfig(sender=SENDER),
    "arena copy": IpcConfig(sender=SENDER, take=Take.copy),
    "live copy": IpcConfig(sender=SENDER, staging=Staging.live, take=Take.copy),
    "live view": IpcConfig(sender=SENDER, staging=Staging.live, take=Take.view),
    "disk": DiskConfig(sender=SENDER),
}
WARM_UP = 100
FEW = 20  # memory maps: a thread of the worker's pool more or less has a few
GONE_S = 5.0
GROWTH = 2 * 2**20  # bytes; one update moves half of that, so a single leaked copy in two would be seen at once


def held(process):
    """What a process holds: resident bytes, descriptors, memory maps."""
    with process.oneshot():
        return process.memory_info().rss, process.num_fds(), len(process.memory_maps(False))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("updates", [in_ci(100), in_full(1000)])
def test_updates_leave_memory_descriptors_and_shared_memory_flat(name, updates, tmp_path):
    weights = {f"w{i}": torch.nn.Parameter(torch.randn(6400)) for i in range(40)}
    before = set(os.listdir("/dev/shm"))
    with make_transfer(CONFIGS[name], tmp_path) as transfer:
        spec = PlainSpec(
            manifest=Manifest.of(weights).to_json(), endpoint=dict(transfer.endpoint), token=secrets.token_urlsafe(32)
        )
        with WorkerProcess("worker 0", "transfer.worker.plain_worker", spec.to_json(), tmp_path / "log") as worker:
            url = f"http://127.0.0.1:{worker.port(time.monotonic() + 60)}"
            with closing(HttpSender(url, spec.token, "worker 0", 20.0)) as sender:
                transfer.open(weights, [sender])
                processes = [psutil.Process(), psutil.Process(worker.pid)]
                for update in range(updates + WARM_UP):
                    if update in (WARM_UP - 1, WARM_UP):  # twice, as to look takes memory, too
                        at_first = [held(process) for process in processes]
                    transfer.withdraw()
                    with torch.no_grad():
                        weights["w7"].add_(1)
                    assert transfer.push(weights) == update
                at_last = [held(process) for process in processes]
                assert sender.call("completions", {})["digest"] == digest_of(weights[name] for name in sorted(weights))
                assert left_in_shared_memory(before, GONE_S, ours=[process.pid for process in processes]) == set()
    for (rss, fds, maps), (rss_then, fds_then, maps_then) in zip(at_first, at_last, strict=True):
        assert fds_then == fds
        assert maps_then - maps <= FEW
        assert rss_then - rss <= GROWTH, f"{updates} updates took {(rss_then - rss) / 2**20:.1f} MiB"
