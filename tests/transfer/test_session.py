import dataclasses
import errno
import fcntl
import gc
import os
import subprocess
import threading
from contextlib import contextmanager

import pytest
import torch
from worker_process import Float8Model, OddModel, PlainModel, fingerprint, in_process, on_gpu, plain, worker_processes

from transfer import make_receiver, make_transfer
from transfer.agreement import wire
from transfer.agreement.journal import Journal
from transfer.agreement.protocol import Phase
from transfer.backends.make import make_intake
from transfer.config import CollectiveConfig, DiskConfig, IpcConfig, LocalConfig, SenderConfig, Staging, Take, Verify
from transfer.trainer.senders.direct import DirectSender
from transfer.worker.landing import Landing

SENDER = SenderConfig(timeout_s=20.0)
CONFIGS = {
    "ipc view": IpcConfig(sender=SENDER),
    "ipc copy": IpcConfig(sender=SENDER, take=Take.copy),
    "gloo": CollectiveConfig(sender=SENDER),
    "disk": DiskConfig(sender=SENDER),
}
LIVE = IpcConfig(sender=SENDER, staging=Staging.live, take=Take.copy)
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


@pytest.fixture
def without_locks(monkeypatch):
    """A file system without locks, where two trainers can write one folder."""

    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)


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
        assert said[:4] == ["status", "status", "init_weight_transfer_engine", "status"]
        assert said[4:] == ["start_weight_update", "update_weights", "finish_weight_update"] * 3
        assert "first.weight" not in str(workers[0].log[4:]), "names travel once"


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


def test_the_older_of_two_trainers_is_refused_everything(tmp_path, without_locks):
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
        with pytest.raises(wire.TransferError, match="agreeing on the weights failed: worker 0"):
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
        assert transfer.push(plain(3)) == 2, "nobody can know whether version 1 was served"
        assert worker.peek()["weights"] == fingerprint(plain(3))


@pytest.mark.slow
def test_a_slot_that_a_silent_worker_may_serve_is_not_overwritten(tmp_path):
    with opened(QUICK, tmp_path) as (transfer, [worker]):
        transfer.push(plain(1))
        worker.faults |= {verb: "mute" for verb in ("finish_weight_update", "status", "abort_weight_update")}
        with pytest.raises(wire.TransferError, match="finishing version 1 failed"):
            transfer.push(plain(2))
        worker.faults["init_weight_transfer_engine"] = "die"
        with pytest.raises(wire.TransferError, match="agreeing on the weights failed"):
            transfer.push(plain(3))
        slots = [fingerprint({"first.bias": slot["first.bias"]}) for slot in transfer._publisher._slots.views]
        assert slots == [fingerprint({"first.bias": plain(seed)["first.bias"]}) for seed in (1, 2)]


def test_a_sender_that_never_comes_back_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("transfer.trainer.fleet.GRACE_S", 0.1)
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


@pytest.mark.parametrize("verb", [pytest.param("start_weight_update", marks=pytest.mark.slow), "update_weights"])
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
        with receivers[1].serving() as turn:  # a completion that takes longer than finish waits
            with pytest.raises(wire.TransferError, match=r"worker 1: .*completions are being generated"):
                transfer.push(plain(2))
            assert turn() == 0 and fingerprint(modules[1].state_dict()) == fingerprint(plain(1))
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


# --- verifying --------------------------------------------------------------------------------------------------------


class Meddler(DirectSender):
    """Changes the staged bytes of a receiver in this process before the verb named `when`."""

    def __init__(self, receiver, transfer, when):
        super().__init__(receiver, "worker 0")
        self._transfer, self._when = transfer, when

    def call(self, verb, body, timeout_s=None):
        if verb == self._when:
            for slot in self._transfer._publisher._slots.views:
                slot["first.bias"][3] += 1
        return super().call(verb, body, timeout_s)


def meddled(tmp_path, when, **dials):
    """Whether a change of the shared bytes before `when` is seen: the error's text, or None; and the phase after it."""
    module, policy = PlainModel(0), PlainModel(1)
    with make_transfer(IpcConfig(sender=SENDER, **dials), tmp_path) as transfer:
        receiver = make_receiver(transfer.endpoint, module)
        transfer.open(policy.state_dict(keep_vars=True), [Meddler(receiver, transfer, when)])
        try:
            transfer.push(policy.state_dict())
        except wire.TransferError as error:
            return str(error), receiver.phase.value
        return None, receiver.phase.value


@pytest.mark.parametrize("take", Take)
def test_bytes_that_change_on_the_way_are_seen_before_they_go_live(take, tmp_path):
    error, phase = meddled(tmp_path, "update_weights", take=take)
    assert "staging version 0: the staged weights have the digest xxh3:" in error and phase == "empty"
    assert meddled(tmp_path, "update_weights", take=take, verify=Verify.off) == (None, "ready")


@pytest.mark.parametrize("take", Take)
def test_only_verify_full_sees_bytes_that_change_after_staging(take, tmp_path):
    assert meddled(tmp_path, "finish_weight_update", take=take) == (None, "ready")
    error, phase = meddled(tmp_path, "finish_weight_update", take=take, verify=Verify.full)
    assert "finishing version 0: the live weights have the digest" in error and phase == "quarantined"


@pytest.mark.parametrize("verify", [Verify.digest, Verify.full])
def test_with_staging_live_what_was_copied_is_verified_as_the_trainer_may_have_gone_on(verify, tmp_path):
    error, phase = meddled(tmp_path, "finish_weight_update", staging=Staging.live, take=Take.copy, verify=verify)
    assert "finishing version 0: the live weights have the digest" in error and phase == "quarantined"


# --- staging=live -----------------------------------------------------------------------------------------------------


def test_with_staging_live_training_writes_into_the_memory_that_workers_read(tmp_path):
    policy = PlainModel(1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    with opened(LIVE, tmp_path, weights=policy.state_dict(keep_vars=True)) as (transfer, [worker]):
        for version in range(4):
            assert transfer.push(policy.state_dict()) == version
            assert worker.peek()["weights"] == fingerprint(policy.state_dict())
            policy.second(policy.first(torch.ones(5))).sum().backward()
            optimizer.step()
        assert worker.peek()["weights"] != fingerprint(policy.state_dict())
        values = fingerprint(policy.state_dict())
    assert fingerprint(policy.state_dict()) == values, "the parameters outlive the session"


def test_with_staging_live_weights_that_are_not_the_shared_ones_are_refused(tmp_path):
    policy = PlainModel(1)
    with (
        opened(LIVE, tmp_path, weights=policy.state_dict()) as (transfer, _),
        pytest.raises(ValueError, match=r"state_dict\(keep_vars=True\)"),
    ):
        transfer.push(policy.state_dict())


def test_with_staging_live_another_dtype_than_the_trainers_is_a_difference_of_the_manifests(tmp_path):
    with (
        pytest.raises(ValueError, match=r"dtype: first\.bias is float32, not bfloat16"),
        opened(LIVE, tmp_path, dtype=torch.bfloat16),
    ):
        pass


# --- workers that are started again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_restarted_worker_serves_nothing_until_it_has_the_newest_version_again(name, tmp_path):
    with opened(CONFIGS[name], tmp_path, count=2) as (transfer, workers):
        transfer.push(plain(1))
        transfer.push(plain(2))
        workers[0].may_restart = True
        workers[0].process.kill()
        workers[0].process.join(20)
        assert workers[0].restart() and workers[0].peek()["version"] is None
        assert transfer.recover(workers[0])
        seen = workers[0].peek()
        assert seen["version"] == 1 and seen["weights"] == fingerprint(plain(2))
        assert not transfer.recover(workers[0]) and not transfer.recover(workers[1]), "nothing is lost"
        assert transfer.push(plain(3)) == 2
        assert all(worker.peek()["weights"] == fingerprint(plain(3)) for worker in workers)


@pytest.mark.parametrize("config", [*CONFIGS.values(), LIVE], ids=[*CONFIGS, "ipc live"])
@pytest.mark.parametrize("fault", ["die", "die after"])
@pytest.mark.parametrize("verb", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_a_worker_that_dies_in_a_push_and_is_started_again_ends_it_with_the_others(verb, fault, config, tmp_path):
    policy = PlainModel(1)
    with opened(config, tmp_path, count=2, weights=policy.state_dict(keep_vars=True)) as (transfer, workers):
        transfer.push(policy.state_dict())
        workers[1].may_restart = True
        workers[1].faults[verb] = fault
        with torch.no_grad():
            policy.first.bias.add_(1)
        assert transfer.push(policy.state_dict()) == 1
        assert transfer.last.restarts == 1
        for worker in workers:
            assert worker.peek()["version"] == 1 and worker.peek()["weights"] == fingerprint(policy.state_dict())


def test_with_staging_live_a_worker_that_lost_its_weights_cannot_get_the_old_version_again(tmp_path):
    policy = PlainModel(1)
    with opened(LIVE, tmp_path, weights=policy.state_dict(keep_vars=True)) as (transfer, [worker]):
        transfer.push(policy.state_dict())
        worker.may_restart = True
        worker.process.kill()
        worker.process.join(20)
        assert not transfer.recover(worker), "the parameters may be those of the next version already"
        assert transfer.push(policy.state_dict()) == 1 and worker.peek()["version"] == 1


# --- messages that come late, and trainers that come back -------------------------------------------------------------


class Late(DirectSender):
    """Instead of a verb named in `instead`, once, calls what stands there; a refusal arrives as from any sender."""

    def __init__(self, receiver, name):
        super().__init__(receiver, name)
        self.instead = {}

    def call(self, verb, body, timeout_s=None):
        instead = self.instead.pop(verb, None)
        return super().call(verb, body, timeout_s) if instead is None else instead(verb, body)

    def lost(self, verb, body):
        raise wire.RemoteError(self.name, verb, 0, "no answer")


def test_a_trainer_that_goes_on_tells_its_version_and_epoch_unless_a_worker_is_further(tmp_path):
    with make_transfer(CONFIGS["ipc view"], tmp_path) as transfer:
        sender = DirectSender(make_receiver(transfer.endpoint, PlainModel(seed=9)), "worker 0")
        transfer.open(plain(0), [sender], version=7, epoch=3)
        assert (transfer.push(plain(0)), transfer.push(plain(1)), transfer.epoch) == (7, 8, 4)
        with make_transfer(CONFIGS["ipc copy"], tmp_path) as late:
            late.open(plain(0), [sender], version=2, epoch=1)
            assert (late.push(plain(0)), late.epoch) == (9, 5)


def test_a_finish_of_a_failed_push_that_comes_during_the_next_one_changes_nothing(tmp_path):
    with make_transfer(CONFIGS["ipc view"], tmp_path) as transfer:
        modules = [PlainModel(seed=9), PlainModel(seed=9)]
        receivers = [make_receiver(transfer.endpoint, module) for module in modules]
        senders = [Late(receiver, f"worker {index}") for index, receiver in enumerate(receivers)]
        transfer.open(plain(0), senders)
        transfer.push(plain(0))
        held = []

        def hold(verb, body):
            held.append(dict(body))
            senders[0].lost(verb, body)

        senders[0].instead["finish_weight_update"] = hold
        senders[1].instead["finish_weight_update"] = senders[1].lost
        with pytest.raises(wire.TransferError, match="finishing version 1 failed"):
            transfer.push(plain(1))

        def then_the_late_one(verb, body):
            answer = receivers[0].update_weights(body)
            with pytest.raises(wire.Refused, match="an older trainer's"):
                receivers[0].finish_weight_update(held.pop())
            return answer

        senders[0].instead["update_weights"] = then_the_late_one
        senders[1].instead["update_weights"] = senders[1].lost
        with pytest.raises(wire.TransferError, match="staging version 2 failed"):
            transfer.push(plain(2))
        assert [receiver.version for receiver in receivers] == [0, 0] and held == []
        for version in (2, 3):
            assert transfer.push(plain(version + 2)) == version
            assert all(fingerprint(module.state_dict()) == fingerprint(plain(version + 2)) for module in modules)


@pytest.mark.parametrize("verify", [Verify.off, Verify.digest])
def test_an_update_that_the_old_trainer_finishes_while_a_new_one_takes_over_is_counted(verify, tmp_path, without_locks):
    config = DiskConfig(sender=SENDER, path=str(tmp_path), verify=verify)
    with make_transfer(config, tmp_path) as old, make_transfer(config, tmp_path) as new:
        module = PlainModel(seed=9)
        receiver = make_receiver(old.endpoint, module)
        old.open(plain(0), [DirectSender(receiver, "worker 0")])
        old.push(plain(0))
        sender = Late(receiver, "worker 0")

        def first_the_old(verb, body):
            old.push(plain(1))
            return sender.call(verb, body)

        sender.instead["init_weight_transfer_engine"] = first_the_old
        new.open(plain(0), [sender])
        for version in (2, 3):
            assert new.push(plain(version + 5)) == version
            assert fingerprint(module.state_dict()) == fingerprint(plain(version + 5))


def test_a_trainer_that_is_replaced_between_its_question_and_its_claim_takes_no_worker_back(tmp_path, without_locks):
    config = DiskConfig(sender=SENDER, path=str(tmp_path))
    with make_transfer(config, tmp_path) as old, make_transfer(config, tmp_path) as new:
        receiver = make_receiver(old.endpoint, PlainModel(seed=9))
        sender = Late(receiver, "worker 0")
        old.open(plain(0), [sender])

        def first_the_new(verb, body):
            new.open(plain(0), [DirectSender(receiver, "worker 0")])
            return sender.call(verb, body)

        sender.instead["finish_weight_update"] = sender.lost
        with pytest.raises(wire.TransferError, match="finishing version 0 failed"):
            old.push(plain(0))
        sender.instead["init_weight_transfer_engine"] = first_the_new
        for _ in range(3):
            with pytest.raises(wire.TransferError, match=r"another trainer has taken over .*open"):
                old.push(plain(1))
        assert new.push(plain(2)) == 0 and receiver.version == 0


def test_a_worker_that_dies_after_its_trainer_was_replaced_is_not_taken_back_by_that_one(tmp_path, without_locks):
    config = DiskConfig(sender=SENDER, path=str(tmp_path))
    with make_transfer(config, tmp_path) as old, make_transfer(config, tmp_path) as new:
        receiver = make_receiver(old.endpoint, PlainModel(seed=9))
        sender = DirectSender(receiver, "worker 0")
        old.open(plain(0), [sender])
        old.push(plain(0))
        new.open(plain(0), [sender])
        with pytest.raises(wire.TransferError):
            old.push(plain(1))
        with pytest.raises(wire.TransferError, match="another trainer has taken over"):
            old.push(plain(1))
        receiver.__init__(make_intake(old.endpoint), Landing.of(PlainModel(seed=9)), Journal())  # started again
        assert old._recovery.rejoined(old._fleet.members) == []  # as a withdrawal that has failed asks
        assert receiver.phase is Phase.EMPTY and sender.call("status", {})["epoch"] == 0


def test_a_trainer_that_was_replaced_takes_no_worker_back_unless_it_opens_again(tmp_path, without_locks):
    config = DiskConfig(sender=SENDER, path=str(tmp_path))
    with make_transfer(config, tmp_path) as old, make_transfer(config, tmp_path) as new:
        receivers = [make_receiver(old.endpoint, PlainModel(seed=9)) for _ in range(2)]
        senders = [DirectSender(receiver, f"worker {index}") for index, receiver in enumerate(receivers)]
        old.open(plain(0), senders)
        old.push(plain(0))
        new.open(plain(0), senders)
        new.push(plain(1))
        receivers[1].__init__(
            make_intake(old.endpoint), Landing.of(PlainModel(seed=9)), Journal()
        )  # as if it had been started again
        assert not old.recover(senders[1])
        assert receivers[1].phase is Phase.EMPTY
        for _ in range(3):
            with pytest.raises(wire.TransferError, match=r"an older trainer's|another trainer has taken over .*open"):
                old.push(plain(2))
        assert new.push(plain(3)) == 2 and [receiver.version for receiver in receivers] == [2, 2]
        old.open(plain(0), senders)
        assert old.push(plain(4)) == 3


def test_a_tensor_that_has_got_another_shape_is_noticed_though_it_is_the_same_object(tmp_path):
    weights = {name: tensor.clone() for name, tensor in plain(1).items()}
    module = PlainModel(seed=0)
    with in_process(CONFIGS["ipc view"], tmp_path, module, weights) as (transfer, _):
        for _ in range(2):
            transfer.push(weights)
        weights["first.weight"].data = torch.ones(1)
        with pytest.raises(wire.TransferError, match=r"first\.weight is not the \[7, 5\] agreed on"):
            transfer.push(weights)
