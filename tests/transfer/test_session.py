import dataclasses
import gc
import os
import subprocess
import threading
from contextlib import contextmanager

import pytest
import torch
from worker_process import Float8Model, OddModel, PlainModel, fingerprint, in_process, on_gpu, plain, worker_processes

from transfer import make_receiver, make_transfer, wire
from transfer.config import DiskConfig, IpcConfig, LocalConfig, SenderConfig, Take
from transfer.senders.direct import DirectSender

SENDER = SenderConfig(timeout_s=20.0)
CONFIGS = {
    "ipc view": IpcConfig(sender=SENDER),
    "ipc copy": IpcConfig(sender=SENDER, take=Take.copy),
    "disk": DiskConfig(sender=SENDER),
}
QUICK = IpcConfig(sender=SenderConfig(timeout_s=1.0))


@contextmanager
def opened(config, tmp_path, model="plain", count=1, weights=None, **dials):
    """An open session, its worker processes, and the weights it was opened with."""
    weights = weights if weights is not None else PlainModel(seed=1).state_dict()
    with (
        make_transfer(config, tmp_path) as transfer,
        worker_processes(transfer.endpoint, model, count, seed=99, **dials) as workers,
    ):
        transfer.open(weights, workers)
        yield transfer, workers


# --- what arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_byte_arrives_on_the_gpu_of_another_process(config, tmp_path):
    with opened(config, tmp_path, "on_gpu", count=2, weights=on_gpu(1).state_dict()) as (transfer, workers):
        for version in range(5):
            assert transfer.push(on_gpu(version).state_dict()) == version
            assert all(worker.peek()["weights"] == fingerprint(plain(version)) for worker in workers)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name, model", [("odd", OddModel), ("float8", Float8Model)])
def test_every_byte_arrives_in_another_process_push_after_push(config, name, model, tmp_path):
    with opened(config, tmp_path, name, weights=model(seed=1).state_dict()) as (transfer, [worker]):
        assert worker.peek()["version"] is None
        for version in range(5):
            weights = model(seed=version).state_dict()
            assert transfer.push(weights) == version
            seen = worker.peek()
            assert seen["version"] == version and seen["weights"] == fingerprint(weights)


def test_weights_are_cast_to_the_dtype_of_the_workers(tmp_path):
    with opened(CONFIGS["ipc view"], tmp_path, count=2, dtype=torch.bfloat16) as (transfer, workers):
        transfer.push(plain(3))
        expected = fingerprint({name: w.bfloat16() for name, w in plain(3).items()})
        assert [worker.peek()["weights"] for worker in workers] == [expected, expected]


def test_with_take_copy_the_addresses_of_the_weights_never_move(tmp_path):
    module = PlainModel(seed=0)
    places = [p.data_ptr() for p in module.parameters()]
    with in_process(CONFIGS["ipc copy"], tmp_path, module, plain(1)) as (transfer, _):
        transfer.push(plain(2))
        assert [p.data_ptr() for p in module.parameters()] == places
        assert fingerprint(module.state_dict()) == fingerprint(plain(2))


def test_with_take_view_a_served_slot_is_never_written(tmp_path):
    module = PlainModel(seed=0)
    with in_process(CONFIGS["ipc view"], tmp_path, module, plain(1)) as (transfer, receiver):
        transfer.push(plain(1))
        stage = receiver._intake.stage

        def look(version, where):
            assert fingerprint(module.state_dict()) == fingerprint(plain(version))
            return stage(version, where)

        receiver._intake.stage = look
        for version in range(1, 4):
            transfer.push(plain(version + 1))


def test_tied_weights_stay_tied(tmp_path):
    module = OddModel(seed=0)
    with in_process(CONFIGS["ipc view"], tmp_path, module, OddModel(1).state_dict()) as (transfer, _):
        transfer.push(OddModel(2).state_dict())
        assert module.head is module.embed and torch.equal(module.head, OddModel(2).embed)


def test_local_moves_nothing_and_counts_versions(tmp_path):
    module = PlainModel(seed=0)
    with in_process(LocalConfig(), tmp_path, module, module.state_dict()) as (transfer, receiver):
        assert receiver.version is None
        assert [transfer.push(module.state_dict()) for _ in range(3)] == [0, 1, 2]
        assert receiver.version == 2 and transfer.last.bytes == 0


def test_a_push_reports_what_it_moved_and_says_little(tmp_path):
    with opened(CONFIGS["ipc view"], tmp_path, count=2) as (transfer, workers):
        for _ in range(3):
            transfer.push(plain(1))
        assert transfer.last.bytes >= sum(w.nbytes for w in plain(1).values())
        assert 0 < transfer.last.write_seconds <= transfer.last.seconds
        assert 0 < transfer.last.control_bytes < 2 * 3 * 400
        said = [verb for verb, _ in workers[0].log]
        assert said[:2] == ["status", "init_weight_transfer_engine"]
        assert said[2:] == ["start_weight_update", "update_weights", "finish_weight_update"] * 3
        assert "first.weight" not in str(workers[0].log[2:]), "names travel once"


# --- agreeing ---------------------------------------------------------------------------------------------------------


def test_models_that_differ_are_refused_with_the_differences_before_any_byte_moves(tmp_path):
    weights = {**PlainModel(seed=1, hidden=6).state_dict(), "extra": torch.zeros(1)}
    del weights["second.bias"]
    with (
        make_transfer(CONFIGS["ipc view"], tmp_path) as transfer,
        worker_processes(transfer.endpoint, "plain", seed=1) as [worker],
    ):
        with pytest.raises(ValueError) as caught:
            transfer.open(weights, [worker])
        for line in (
            "worker 0",
            "unexpected: extra",
            "shape: first.weight is [7, 6], not [7, 5]",
            "missing: second.bias",
        ):
            assert line in str(caught.value)
        status = worker.call("status", {})
        assert (status["phase"], status["epoch"]) == ("empty", 0), "a refused trainer takes no epoch"


def test_workers_that_want_different_dtypes_are_refused(tmp_path):
    with make_transfer(CONFIGS["disk"], tmp_path) as transfer:
        dtypes = torch.float32, torch.bfloat16
        receivers = [make_receiver(transfer.endpoint, PlainModel(seed=1, dtype=dtype)) for dtype in dtypes]
        with pytest.raises(ValueError, match=r"one dtype.*'0': 'float32', '1': 'bfloat16'"):
            transfer.open(plain(1), [DirectSender(r, str(i)) for i, r in enumerate(receivers)])


def test_the_older_of_two_trainers_is_refused_everything(tmp_path):
    with opened(CONFIGS["disk"], tmp_path) as (older, [worker]):
        assert older.push(plain(1)) == 0
        with make_transfer(CONFIGS["disk"], tmp_path) as newer:
            newer.open(plain(1), [worker])
            assert newer.push(plain(2)) == 1, "versions go on where the last trainer ended"
            with pytest.raises(
                wire.TransferError, match=r"worker 0: start_weight_update: epoch 1 is an older trainer's"
            ):
                older.push(plain(3))
            seen = worker.peek()
            assert seen["version"] == 1 and seen["weights"] == fingerprint(plain(2))


def test_a_push_before_open_and_an_open_without_workers_say_what_to_do(tmp_path):
    with make_transfer(CONFIGS["disk"], tmp_path) as transfer:
        with pytest.raises(ValueError, match="open the transfer"):
            transfer.push(plain(1))
        with pytest.raises(ValueError, match="at least one worker"):
            transfer.open(plain(1), [])


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_before_anybody_is_told(value, tmp_path):
    with opened(CONFIGS["ipc view"], tmp_path) as (transfer, [worker]):
        transfer.push(plain(1))
        said = len(worker.log)
        broken = plain(2)
        broken["second.weight"][1, 3] = value
        with pytest.raises(wire.TransferError, match=r"version 1: second.weight has values that are not finite"):
            transfer.push(broken)
        assert len(worker.log) == said
        assert transfer.push(plain(3)) == 1


def test_weights_that_overflow_in_the_workers_dtype_are_refused(tmp_path):
    with in_process(CONFIGS["disk"], tmp_path, PlainModel(0, dtype=torch.float16), plain(1)) as (transfer, _):
        broken = plain(2)
        broken["first.bias"][0] = 1e6
        with pytest.raises(wire.TransferError, match=r"first.bias has values that are not finite"):
            transfer.push(broken)


def test_weights_that_changed_their_names_shapes_or_ties_are_refused(tmp_path):
    weights = OddModel(1).state_dict()
    with in_process(CONFIGS["disk"], tmp_path, OddModel(0), weights) as (transfer, _):
        with pytest.raises(wire.TransferError, match="other names than agreed on: more"):
            transfer.push({**weights, "more": torch.zeros(1)})
        with pytest.raises(wire.TransferError, match=r"scale is not the \[\] agreed on"):
            transfer.push({**weights, "scale": torch.zeros(1)})
        with pytest.raises(wire.TransferError, match="embed is no longer tied"):
            transfer.push({**weights, "head": weights["head"].clone()})


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_fault_in_the_middle_keeps_the_old_weights_in_every_worker(config, tmp_path):
    with opened(config, tmp_path, count=2) as (transfer, workers):
        transfer.push(plain(1))
        workers[1].faults["update_weights"] = "half"
        with pytest.raises(wire.TransferError) as caught:
            transfer.push(plain(2))
        assert "worker 1: update_weights: staging version 1: a fault in the middle of staging" in str(caught.value)
        for worker in workers:
            seen = worker.peek()
            assert seen["version"] == 0 and seen["weights"] == fingerprint(plain(1))
            assert worker.call("status", {})["phase"] == "ready"
        assert transfer.push(plain(3)) == 1
        assert all(worker.peek()["weights"] == fingerprint(plain(3)) for worker in workers)


@pytest.mark.parametrize("verb", ["start_weight_update", "update_weights"])
@pytest.mark.parametrize("fault", ["die", "die after"])
def test_a_worker_that_dies_before_finish_is_named_and_the_others_keep_the_old_weights(verb, fault, tmp_path):
    with opened(QUICK, tmp_path, count=2) as (transfer, workers):
        transfer.push(plain(1))
        workers[0].faults[verb] = fault
        with pytest.raises(
            wire.TransferError, match=rf"staging version 1 failed: worker 0: {verb}: the worker is gone"
        ):
            transfer.push(plain(2))
        seen = workers[1].peek()
        assert seen["version"] == 0 and seen["weights"] == fingerprint(plain(1))


def test_a_worker_that_dies_in_finish_ends_the_push_with_an_error(tmp_path):
    with opened(QUICK, tmp_path, count=2) as (transfer, workers):
        transfer.push(plain(1))
        workers[0].faults["finish_weight_update"] = "die"
        with pytest.raises(wire.TransferError, match="finishing version 1 failed: worker 0"):
            transfer.push(plain(2))
        assert workers[1].peek()["weights"] == fingerprint(plain(2)), "whole, whichever it is"
        with pytest.raises(wire.TransferError, match="version 1 failed: worker 0"):
            transfer.push(plain(3))


def test_an_answer_to_finish_that_is_lost_counts_once(tmp_path):
    with opened(QUICK, tmp_path) as (transfer, [worker]):
        transfer.push(plain(1))
        worker.faults["finish_weight_update"] = "mute"
        assert transfer.push(plain(2)) == 1
        assert [verb for verb, _ in worker.log[-3:]] == ["update_weights", "finish_weight_update", "status"]
        assert worker.peek()["weights"] == fingerprint(plain(2))
        assert transfer.push(plain(3)) == 2


def test_a_finish_that_never_arrived_is_taken_back_and_the_next_push_works(tmp_path):
    with opened(QUICK, tmp_path) as (transfer, [worker]):
        transfer.push(plain(1))
        worker.faults["finish_weight_update"] = "deaf"
        with pytest.raises(wire.TransferError, match=r"finishing version 1 failed: worker 0: .*no answer"):
            transfer.push(plain(2))
        assert worker.call("status", {})["phase"] == "ready" and worker.peek()["weights"] == fingerprint(plain(1))
        assert transfer.push(plain(3)) == 1
        assert worker.peek()["weights"] == fingerprint(plain(3))


def test_a_slot_that_a_silent_worker_may_serve_is_not_overwritten(tmp_path):
    with opened(QUICK, tmp_path) as (transfer, [worker]):
        transfer.push(plain(1))
        worker.faults |= {verb: "mute" for verb in ("finish_weight_update", "status", "abort_weight_update")}
        with pytest.raises(wire.TransferError, match="finishing version 1 failed"):
            transfer.push(plain(2))
        worker.faults["start_weight_update"] = "die"
        with pytest.raises(wire.TransferError, match="staging version 1 failed"):
            transfer.push(plain(3))
        slots = [fingerprint({"first.bias": slot["first.bias"]}) for slot in transfer._publisher._views]
        assert slots == [fingerprint({"first.bias": plain(seed)["first.bias"]}) for seed in (1, 2)]


def test_a_sender_that_never_comes_back_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("transfer.session.GRACE_S", 0.1)
    released = threading.Event()

    class Stuck(DirectSender):
        def call(self, verb, body, timeout_s=None):
            return released.wait(60) if verb == "update_weights" else super().call(verb, body, timeout_s)

    with make_transfer(IpcConfig(sender=SenderConfig(timeout_s=0.1)), tmp_path) as transfer:
        receiver = make_receiver(transfer.endpoint, PlainModel(0))
        transfer.open(plain(1), [Stuck(receiver, "worker 0")])
        with pytest.raises(wire.TransferError, match=r"worker 0: .*its sender does not come back"):
            transfer.push(plain(1))
        released.set()


@pytest.mark.parametrize("verb", ["start_weight_update", "update_weights"])
def test_an_answer_while_staging_that_is_lost_aborts_and_the_next_push_works(verb, tmp_path):
    with opened(QUICK, tmp_path, count=2) as (transfer, workers):
        transfer.push(plain(1))
        workers[1].faults[verb] = "mute"
        with pytest.raises(wire.TransferError, match=rf"worker 1: {verb}: no answer"):
            transfer.push(plain(2))
        assert [worker.call("status", {})["phase"] for worker in workers] == ["ready", "ready"]
        assert transfer.push(plain(3)) == 1
        assert all(worker.peek()["weights"] == fingerprint(plain(3)) for worker in workers)


def test_a_worker_that_missed_finish_catches_up_and_no_served_slot_is_overwritten(tmp_path):
    with make_transfer(QUICK, tmp_path) as transfer:
        modules = [PlainModel(seed=0), PlainModel(seed=0)]
        receivers = [make_receiver(transfer.endpoint, module) for module in modules]
        transfer.open(plain(1), [DirectSender(r, f"worker {i}") for i, r in enumerate(receivers)])
        transfer.push(plain(1))
        with receivers[1].serving() as version:  # a completion that takes longer than finish waits
            with pytest.raises(wire.TransferError, match=r"worker 1: .*completions are being generated"):
                transfer.push(plain(2))
            assert version == 0 and fingerprint(modules[1].state_dict()) == fingerprint(plain(1))
            with pytest.raises(wire.TransferError, match="worker 1"):
                transfer.push(plain(3))
            assert fingerprint(modules[1].state_dict()) == fingerprint(plain(1))
            assert fingerprint(modules[0].state_dict()) == fingerprint(plain(2))
        assert transfer.push(plain(4)) == 2
        assert [fingerprint(m.state_dict()) for m in modules] == [fingerprint(plain(4))] * 2
        assert [receiver.version for receiver in receivers] == [2, 2]


def test_a_disk_that_is_full_ends_the_push_before_anybody_is_told(tmp_path, monkeypatch):
    with in_process(CONFIGS["disk"], tmp_path, PlainModel(0), plain(1)) as (transfer, receiver):
        transfer.push(plain(1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(wire.TransferError, match=r"writing version 1 failed: .*No space left"):
                transfer.push(plain(2))
        assert receiver.status()["phase"] == "ready" and transfer.push(plain(2)) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_file_system_that_is_really_full_ends_the_push_with_the_old_weights_live(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        config = dataclasses.replace(CONFIGS["disk"], path=str(small))
        with in_process(config, tmp_path, PlainModel(0), plain(1)) as (transfer, receiver):
            transfer.push(plain(1))
            (small / "other").write_bytes(b"x" * (os.statvfs(small).f_bavail * os.statvfs(small).f_frsize))
            with pytest.raises(wire.TransferError, match=r"writing version 1 failed: .*No space left"):
                transfer.push(plain(2))
            assert receiver.status()["version"] == 0
            (small / "other").unlink()
            assert transfer.push(plain(2)) == 1
    finally:
        subprocess.run(["umount", small], check=True)


# --- nothing is left --------------------------------------------------------------------------------------------------


def test_pushes_leak_no_descriptor_and_close_leaves_no_memory(tmp_path):
    def held():
        gc.collect()
        return set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))

    with opened(CONFIGS["ipc view"], tmp_path):
        pass  # starts the server that forks the workers, which stays
    before = held()
    with opened(CONFIGS["ipc view"], tmp_path) as (transfer, [worker]):
        transfer.push(plain(1))
        busy, there = held(), worker.peek()["descriptors"]
        for seed in range(30):
            transfer.push(plain(seed))
        assert held() == busy and worker.peek()["descriptors"] == there
    assert held() == before


def test_a_session_that_opens_again_serves_its_workers_anew(tmp_path):
    with opened(CONFIGS["ipc view"], tmp_path) as (transfer, workers):
        transfer.push(plain(1))
        with worker_processes(transfer.endpoint, "plain", 1, seed=7) as fresh:
            transfer.open(plain(1), [*workers, *fresh])
            version = transfer.push(plain(2))
            assert [w.peek()["version"] for w in (*workers, *fresh)] == [version] * 2
            assert all(w.peek()["weights"] == fingerprint(plain(2)) for w in (*workers, *fresh))
