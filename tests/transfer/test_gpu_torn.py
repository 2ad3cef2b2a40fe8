"""Weights that a trainer changes in GPU memory before a worker, stopped or late, has read them: it does not serve them.

tests/gpu/run_all.py runs these with all else that needs a GPU.
"""

import json
import os
import signal
import time

import pytest
import torch
from gpu_trainer import train, weights_of
from test_gpu import DEVICE, WAYS, expected, opened, two_gpus, workers

from transfer.agreement import wire
from transfer.agreement.manifest import Manifest
from transfer.engine import ipc
from transfer.engine.handles import Exporter
from transfer.memory.mark import WENT_ON

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WAIT_S = 60.0
MIB = 64


def refusals(folder):
    """Why the worker has given updates up, by its journal."""
    lines = (folder / "journal" / "worker-0.jsonl").read_text().splitlines()
    events = map(json.loads, lines)
    return [event["result"] for event in events if event["op"] == "failed"]


def within(seconds, holds):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("verify", ["", " off"])
@pytest.mark.parametrize("device", [DEVICE, pytest.param("cuda:1", marks=two_gpus)])
def test_a_stopped_worker_that_copies_live_weights_after_its_trainer_went_on_serves_nothing(
    device, verify, tmp_path, monkeypatch
):
    weights = weights_of(MIB, DEVICE)
    with opened(WAYS[f"live copy{verify}"], tmp_path, weights, devices=(device,)) as (transfer, [worker]):
        for _ in range(2):  # the second one is copied as all later ones are
            train(weights)
            transfer.push(weights)
        before = worker.holds()
        assert before["digest"] == expected(weights)
        monkeypatch.setattr(transfer._fleet, "_timeout_s", 1.0)
        os.kill(worker.process.pid, signal.SIGSTOP)
        try:
            train(weights)
            with pytest.raises(wire.TransferError, match="no answer within"):
                transfer.push(weights)
            train(weights)  # the trainer has caught the error, and trains on
        finally:
            os.kill(worker.process.pid, signal.SIGCONT)
        within(WAIT_S, lambda: refusals(tmp_path))
        [why] = refusals(tmp_path)
        assert WENT_ON in why
        with pytest.raises(wire.RemoteError, match="quarantined"):
            worker.holds()
        monkeypatch.setattr(transfer._fleet, "_timeout_s", 20.0)
        version = transfer.push(weights)
        assert version > before["version"] + 1, "the number of the update that was given up is used up"
        assert worker.holds() == {"version": version, "digest": expected(weights)}


def test_a_worker_reads_one_call_while_its_trainer_waits_and_does_not_serve_what_it_reads_later(tmp_path):
    weights = weights_of(MIB, DEVICE)
    with workers(tmp_path, {"backend": "local"}, Manifest.of(weights)) as [worker]:
        train(weights)
        with Exporter() as exporter:
            worker.sender.call("update_weights", message(weights, exporter))
        before = worker.holds()
        assert before == {"version": 0, "digest": expected(weights)}
        with Exporter() as exporter:
            late = message(weights, exporter)
            exporter.pledge.close()  # first of all, when a call ends without an answer; then the trainer goes on
            train(weights)
            with pytest.raises(wire.RemoteError, match="has gone on before its weights were read"):
                worker.sender.call("update_weights", late)
            assert worker.holds() == before
        with pytest.raises(wire.RemoteError, match="update_weights"):
            worker.sender.call("update_weights", late)
        assert worker.holds() == before
        with Exporter() as exporter:
            worker.sender.call("update_weights", message(weights, exporter))
        assert worker.holds() == {"version": 1, "digest": expected(weights)}


def message(weights, exporter):
    """A one-shot update as vLLM's route takes it."""
    told = ipc._messages(weights.items(), exporter, 1)[0]
    assert exporter.pledge is not None
    return {"update_info": {**told, "ipc_handles": None, "ipc_handles_pickled": ipc._pickled(told["ipc_handles"])}}
