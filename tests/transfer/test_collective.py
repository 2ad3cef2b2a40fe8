import contextlib
import gc
import math
import os
import re
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from test_session import opened
from worker_process import CONTEXT, Float8Model, OddModel, PlainModel, fingerprint, in_process, on_gpu, plain

from transfer import make_receiver, make_transfer
from transfer.agreement import wire
from transfer.agreement.manifest import ALIGNMENT, Manifest
from transfer.backends.buckets import buckets_of
from transfer.backends.collective_intake import Block
from transfer.backends.group_ends import LINGER_S, TrainerGroup, WorkerGroup
from transfer.backends.process_group import LOOK_S, POLL_S
from transfer.config import CollectiveConfig, Library, SenderConfig, Take, Verify
from transfer.memory.digest import digest_of
from transfer.trainer.senders.direct import DirectSender
from transfer.trainer.senders.http import HttpSender
from transfer.worker.plain_worker import PlainSpec
from transfer.worker.process import WorkerProcess

TIMEOUT_S = 6.0
SENDER = SenderConfig(timeout_s=TIMEOUT_S)
GLOO = CollectiveConfig(sender=SENDER)
NCCL = CollectiveConfig(sender=SENDER, library=Library.nccl)
SLACK_S = 6.0  # of a busy machine


def small_buckets(transfer, size=ALIGNMENT):
    """Let the trainer send in buckets of a few hundred bytes, so that tensors lie across their borders."""
    transfer._publisher._size = size


def before_bucket(transfer, index, act):
    """Call `act` once, in the trainer, before it packs the bucket with this number."""
    packed, left = transfer._publisher._packed, [act]

    def watched():
        count, pack = packed()

        def acting(number):
            if number == index and left:
                left.pop()()
            return pack(number)

        return count, acting

    transfer._publisher._packed = watched


def large(seed):
    """40 tensors of 128 KiB."""
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i:02d}": torch.randn(2**15, generator=generator) for i in range(40)}


# --- what arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("take", Take)
def test_nccl_moves_every_byte_to_the_gpu_of_another_process(take, tmp_path):
    config = CollectiveConfig(sender=SenderConfig(timeout_s=60.0), library=Library.nccl, take=take)
    with opened(config, tmp_path, "on_second_gpu", weights=on_gpu(1).state_dict()) as (transfer, [worker]):
        small_buckets(transfer)
        for version in range(5):
            assert transfer.push(on_gpu(version).state_dict()) == version
            assert worker.peek()["weights"] == fingerprint(plain(version))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_nccl_survives_a_worker_that_is_killed_while_it_receives_and_is_started_again(tmp_path):
    config = CollectiveConfig(sender=SenderConfig(timeout_s=60.0), library=Library.nccl)
    with opened(config, tmp_path, "on_second_gpu", weights=on_gpu(1).state_dict()) as (transfer, [worker]):
        small_buckets(transfer)
        transfer.push(on_gpu(1).state_dict())
        worker.may_restart = True
        before_bucket(transfer, 1, lambda: os.kill(worker.process.pid, signal.SIGKILL))
        assert transfer.push(on_gpu(2).state_dict()) == 1 and transfer.last.restarts == 1
        assert worker.peek()["weights"] == fingerprint(plain(2))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_nccl_ends_by_the_deadline_if_a_worker_is_stopped_and_works_again_later(tmp_path):
    with opened(NCCL, tmp_path, "on_second_gpu", weights=on_gpu(1).state_dict()) as (transfer, [worker]):
        small_buckets(transfer)
        transfer.push(on_gpu(1).state_dict())
        before_bucket(transfer, 1, lambda: os.kill(worker.process.pid, signal.SIGSTOP))
        began = time.monotonic()
        try:
            with pytest.raises(wire.TransferError, match="staging version 1 failed: worker 0"):
                transfer.push(on_gpu(2).state_dict())
            assert time.monotonic() - began < 4 * TIMEOUT_S + SLACK_S
        finally:
            os.kill(worker.process.pid, signal.SIGCONT)
        deadline = time.monotonic() + 2 * TIMEOUT_S
        while worker.call("status", {})["phase"] != "ready" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert worker.peek()["weights"] == fingerprint(plain(1))
        assert transfer.push(on_gpu(3).state_dict()) == 1
        assert worker.peek()["weights"] == fingerprint(plain(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nccl_between_processes_on_one_gpu_is_refused_with_what_to_use(tmp_path):
    refused = r"transfer=nccl needs a GPU of its own .*use transfer=ipc on one GPU"
    with pytest.raises(ValueError, match=refused), opened(NCCL, tmp_path, "on_gpu", weights=on_gpu(1).state_dict()):
        pass


@pytest.mark.parametrize("take", Take)
@pytest.mark.parametrize("name, model", [("odd", OddModel), ("float8", Float8Model)])
def test_every_byte_arrives_in_two_workers_also_across_the_borders_of_buckets(take, name, model, tmp_path):
    config = CollectiveConfig(sender=SENDER, take=take)
    with opened(config, tmp_path, name, count=2, weights=model(seed=1).state_dict()) as (transfer, workers):
        small_buckets(transfer)
        for version in range(4):
            weights = model(seed=version).state_dict()
            assert transfer.push(weights) == version
            assert [worker.peek()["weights"] for worker in workers] == [fingerprint(weights)] * 2
        assert transfer.last.bytes > 2 * ALIGNMENT and transfer.last.control_bytes < 2 * 3 * 400
        assert not torch.distributed.is_initialized(), "torch's default group is the user's"


def test_weights_are_cast_to_the_dtype_of_the_workers_while_they_are_packed(tmp_path):
    weights = {"a.odd": torch.randn(301), "b.long": torch.arange(7), "c.wide": torch.randn(40, 30).t()}
    expected = {name: w.bfloat16() if w.is_floating_point() else w for name, w in weights.items()}
    module = torch.nn.Module()
    module.state_dict = lambda **options: {name: torch.zeros_like(w) for name, w in expected.items()}
    with in_process(GLOO, tmp_path, module, weights) as (transfer, receiver):
        small_buckets(transfer)
        taken = {}
        view = receiver._landing.view
        receiver._landing.view = lambda staged: (taken.update(staged), view(staged))
        transfer.push(weights)
        assert fingerprint(taken) == fingerprint(expected)


@pytest.mark.parametrize("size", [ALIGNMENT, 2 * ALIGNMENT, 2**20])
def test_buckets_hold_every_byte_once_and_divide_no_element(size):
    manifest = Manifest.of({**OddModel(1).state_dict(), "z": torch.zeros(999, dtype=torch.complex128)})
    buckets = buckets_of(manifest, size)
    assert [b.start for b in buckets] == list(range(0, manifest.nbytes, size))
    assert all(b.end - b.start <= size for b in buckets) and buckets[-1].end == manifest.nbytes
    for entry in manifest.entries:
        pieces = [(first, last) for b in buckets for held, first, last, _ in b.pieces if held is entry]
        assert [byte for first, last in pieces for byte in range(first, last)] == list(range(entry.nbytes))
        assert all(border % entry.torch_dtype.itemsize == 0 for piece in pieces for border in piece)
    for bucket in buckets:
        assert all(
            bucket.start <= e.offset + first <= e.offset + last <= bucket.end for e, first, last, _ in bucket.pieces
        )


def test_the_next_bucket_is_packed_while_one_is_under_way(tmp_path):
    with opened(GLOO, tmp_path, weights=PlainModel(1).state_dict()) as (transfer, _):
        small_buckets(transfer)
        transfer.push(plain(1))
        under_way = []
        packed = transfer._publisher._packed

        def watched():
            count, pack = packed()
            group = transfer._publisher._group
            return count, lambda index: (under_way.append(len(group._under_way)), pack(index))[1]

        transfer._publisher._packed = watched
        transfer.push(plain(2))
        assert len(under_way) == math.ceil(transfer.last.bytes / ALIGNMENT) > 3
        assert under_way == [0] + [1] * (len(under_way) - 1)


@pytest.mark.parametrize("take", Take)
def test_live_weights_stay_as_they_are_until_finish(take, tmp_path):
    module = PlainModel(seed=0)
    with in_process(CollectiveConfig(sender=SENDER, take=take), tmp_path, module, plain(1)) as (transfer, receiver):
        transfer.push(plain(1))
        finish = receiver.finish_weight_update

        def look(body):
            assert fingerprint(module.state_dict()) == fingerprint(plain(int(body["weight_version"])))
            return finish(body)

        receiver.finish_weight_update = look
        places = [p.data_ptr() for p in module.parameters()]
        for version in range(1, 4):
            transfer.push(plain(version + 1))
        assert ([p.data_ptr() for p in module.parameters()] == places) == (take is Take.copy)


@pytest.mark.parametrize("take", Take)
def test_memory_of_earlier_updates_is_used_again_and_never_while_it_is_live(take, tmp_path, monkeypatch):
    made = []

    class CountedBlock(Block):
        def __init__(self, *arguments):
            made.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr("transfer.backends.collective_intake.Block", CountedBlock)
    module = PlainModel(seed=0)
    with in_process(CollectiveConfig(sender=SENDER, take=take), tmp_path, module, plain(1)) as (transfer, receiver):
        transfer.push(plain(1))
        stage = receiver._intake.stage

        def looked_at(version, where):
            live = fingerprint(module.state_dict())
            staged = stage(version, where)
            assert fingerprint(module.state_dict()) == live
            if version in fails:
                fails.remove(version)
                raise RuntimeError("a fault")
            return staged

        receiver._intake.stage, fails = looked_at, [2, 3]
        for seed in range(2, 10):
            with contextlib.suppress(wire.TransferError):
                transfer.push(plain(seed))
                assert fingerprint(module.state_dict()) == fingerprint(plain(seed))
        assert not fails and transfer.push(plain(1)) == 7
        assert len(made) <= 2 * 3, "of 10 updates, each pair for as long as trainer and worker do not agree anew"


# --- peers that die ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [0, 3])
def test_a_worker_killed_while_it_receives_ends_the_push_and_the_other_serves_the_old_weights(bucket, tmp_path):
    with opened(GLOO, tmp_path, count=2) as (transfer, workers):
        small_buckets(transfer)
        transfer.push(plain(1))
        before_bucket(transfer, bucket, lambda: os.kill(workers[0].process.pid, signal.SIGKILL))
        began = time.monotonic()
        with pytest.raises(wire.TransferError, match=r"staging version 1 failed: .*worker 0: .*the worker is gone"):
            transfer.push(plain(2))
        assert time.monotonic() - began < TIMEOUT_S + SLACK_S
        seen = workers[1].peek()
        assert seen["version"] == 0 and seen["weights"] == fingerprint(plain(1))
        assert workers[1].call("status", {})["phase"] == "ready"


@pytest.mark.parametrize("bucket", [0, 3])
def test_a_worker_killed_while_it_receives_and_started_again_ends_the_push_with_the_other(bucket, tmp_path):
    with opened(GLOO, tmp_path, count=2) as (transfer, workers):
        small_buckets(transfer)
        transfer.push(plain(1))
        workers[0].may_restart = True
        before_bucket(transfer, bucket, lambda: os.kill(workers[0].process.pid, signal.SIGKILL))
        assert transfer.push(plain(2)) == 1 and transfer.last.restarts == 1
        assert [worker.peek()["weights"] for worker in workers] == [fingerprint(plain(2))] * 2
        assert transfer.push(plain(3)) == 2
        assert [worker.peek()["weights"] for worker in workers] == [fingerprint(plain(3))] * 2


@pytest.mark.slow
def test_a_worker_that_is_stopped_ends_the_push_by_its_deadline_and_takes_part_again_later(tmp_path):
    config = CollectiveConfig(sender=SenderConfig(timeout_s=2.0))
    with opened(config, tmp_path, count=2) as (transfer, workers):
        small_buckets(transfer)
        transfer.push(plain(1))
        before_bucket(transfer, 1, lambda: os.kill(workers[0].process.pid, signal.SIGSTOP))
        began = time.monotonic()
        try:
            with pytest.raises(wire.TransferError, match=r"staging version 1 failed: .*worker 0: "):
                transfer.push(plain(2))
            assert time.monotonic() - began < 5 * 2.0 + SLACK_S
            seen = workers[1].peek()
            assert seen["version"] == 0 and seen["weights"] == fingerprint(plain(1))
        finally:
            os.kill(workers[0].process.pid, signal.SIGCONT)
        while workers[0].call("status", {})["phase"] != "ready":
            time.sleep(0.05)
        assert transfer.push(plain(3)) == 1
        assert [worker.peek()["weights"] for worker in workers] == [fingerprint(plain(3))] * 2


def train_until_killed(url, token, folder):
    """A trainer that pushes one version, and is killed in the middle of the next."""
    sender = HttpSender(url, token, "worker 0", TIMEOUT_S)
    with make_transfer(GLOO, Path(folder)) as transfer, closing(sender):
        small_buckets(transfer, 2**17)
        transfer.open(large(0), [sender])
        transfer.push(large(1))
        before_bucket(transfer, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
        transfer.push(large(2))


def test_a_worker_goes_on_serving_when_its_trainer_is_killed_and_obeys_the_next_one(tmp_path):
    with make_transfer(GLOO, tmp_path) as transfer:
        manifest = Manifest.of(large(0)).to_json()
        spec = PlainSpec(manifest=manifest, endpoint=dict(transfer.endpoint), token="secret")
        with WorkerProcess("worker 0", "transfer.worker.plain_worker", spec.to_json(), tmp_path / "log") as worker:
            url = f"http://127.0.0.1:{worker.port(time.monotonic() + 60)}"
            with closing(HttpSender(url, spec.token, "worker 0", TIMEOUT_S)) as sender:
                trainer = CONTEXT.Process(target=train_until_killed, args=(url, spec.token, str(tmp_path)))
                trainer.start()
                trainer.join(60)
                assert trainer.exitcode == -signal.SIGKILL
                deadline = time.monotonic() + TIMEOUT_S
                while sender.call("status", {})["phase"] != "ready":
                    assert time.monotonic() < deadline, "the worker still waits for a dead trainer"
                    time.sleep(0.02)
                assert sender.call("completions", {}) == {"version": 0, "digest": digest_of(large(1).values())}
                transfer.open(large(0), [sender])
                assert transfer.push(large(3)) == 1
                assert sender.call("completions", {}) == {"version": 1, "digest": digest_of(large(3).values())}


def test_a_worker_that_never_comes_to_the_broadcast_does_not_keep_the_others(tmp_path):
    class Refuses(DirectSender):
        def call(self, verb, body, timeout_s=None):
            if verb == "update_weights":
                raise wire.RemoteError(self.name, verb, 500, "not now")
            return super().call(verb, body, timeout_s)

    with make_transfer(CollectiveConfig(sender=SenderConfig(timeout_s=60.0)), tmp_path) as transfer:
        modules = [PlainModel(seed=5), PlainModel(seed=5)]
        receivers = [make_receiver(transfer.endpoint, module) for module in modules]
        transfer.open(plain(1), [Refuses(receivers[0], "worker 0"), DirectSender(receivers[1], "worker 1")])
        began = time.monotonic()
        with pytest.raises(wire.TransferError, match=r"worker 0: update_weights: not now .*worker 1: .*gave the broad"):
            transfer.push(plain(2))
        assert time.monotonic() - began < 30  # half of a deadline
        assert fingerprint(modules[1].state_dict()) == fingerprint(plain(5))


# --- what a worker that was started again can get ---------------------------------------------------------------------


@pytest.mark.parametrize("verify", [Verify.digest, Verify.off])
def test_a_worker_that_lost_its_weights_gets_no_others_than_those_of_the_version(verify, tmp_path):
    policy = PlainModel(1)
    config = CollectiveConfig(sender=SENDER, verify=verify)
    with opened(config, tmp_path, count=2, weights=policy.state_dict()) as (transfer, workers):
        transfer.push(policy.state_dict())
        served = fingerprint(policy.state_dict())
        workers[0].may_restart = True
        for changes in (False, True):
            workers[0].process.kill()
            workers[0].process.join(20)
            if changes:
                with torch.no_grad():
                    policy.first.bias.add_(1)
            assert transfer.recover(workers[0]) == (verify is Verify.digest and not changes)
            if not changes and verify is Verify.digest:
                assert workers[0].peek()["version"] == 0 and workers[0].peek()["weights"] == served
        assert transfer.push(policy.state_dict()) == 1
        assert [worker.peek()["weights"] for worker in workers] == [fingerprint(policy.state_dict())] * 2


# --- integrity, and who may come --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", Verify)
def test_bytes_that_change_on_the_way_are_refused_unless_verify_is_off(verify, tmp_path):
    module = PlainModel(seed=0)
    config = CollectiveConfig(sender=SENDER, verify=verify)
    with in_process(config, tmp_path, module, plain(1)) as (transfer, receiver):
        transfer.push(plain(1))
        changed = plain(2)

        def meddle():
            changed["second.weight"][1, 1] += 1

        before_bucket(transfer, 0, meddle)
        with (
            contextlib.nullcontext()
            if verify is Verify.off
            else pytest.raises(wire.TransferError, match="staging version 1: the staged weights have the digest xxh3:")
        ):
            transfer.push(changed)
        assert receiver.version == (1 if verify is Verify.off else 0)
        assert fingerprint(module.state_dict()) == fingerprint(changed if verify is Verify.off else plain(1))


def test_trainer_and_workers_listen_on_loopback_alone(tmp_path):
    with opened(GLOO, tmp_path, count=2) as (transfer, workers):
        transfer.push(plain(1))
        for pid in (os.getpid(), *(worker.process.pid for worker in workers)):
            listening = [c for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            assert listening and {c.laddr.ip for c in listening} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"port": 0}, r"where\.port has a value that is not allowed"),
        ({"bucket": 100}, r"where\.bucket has a value"),
        ({"nonce": "../x"}, r"where\.nonce has a value"),
        ({"world": 1}, r"where\.world has a value"),
        ({"host": "192.0.2.1"}, r"where\.host is not known"),
        ({"port": None}, r"where\.port is missing"),
    ],
)
def test_a_message_that_names_no_proper_broadcast_is_refused(change, refusal, tmp_path):
    with in_process(GLOO, tmp_path, PlainModel(0), plain(1)) as (_, receiver):
        where = {"bucket": ALIGNMENT, "port": 9, "nonce": "0" * 32, "world": 2} | change
        where = {key: value for key, value in where.items() if value is not None}
        with pytest.raises(wire.Refused, match=refusal):
            receiver._intake.stage(0, where)


def test_a_store_that_is_gone_is_named_at_once(tmp_path):
    patient = CollectiveConfig(sender=SenderConfig(timeout_s=60.0))
    with in_process(patient, tmp_path, PlainModel(0), plain(1)) as (_, receiver):
        began = time.monotonic()
        with pytest.raises(OSError, match=r"cannot be reached at 127\.0\.0\.1:9 \(transfer\.host\)"):
            receiver._intake.stage(0, {"bucket": ALIGNMENT, "port": 9, "nonce": "0" * 32, "world": 2})
        assert time.monotonic() - began < 30


# --- nothing is left --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_pushes_and_many_groups_leave_descriptors_threads_and_memory_flat(tmp_path):
    def held(worker):
        time.sleep(4 * LOOK_S)  # in which threads that still look after a broadcast end
        processes = psutil.Process(), psutil.Process(worker.process.pid)
        return [(p.num_fds(), p.num_threads()) for p in processes], [p.memory_info().rss for p in processes]

    weights = large(1)
    module = {"manifest": Manifest.of(weights).to_json()}
    with opened(GLOO, tmp_path, "bag", weights=weights, **module) as (transfer, [worker]):
        for push in range(260):
            if push == 30:
                counts, sizes = held(worker)
            if push % 10 == 0:
                transfer._publisher._drop_group()  # the next push forms another
            weights["w07"].add_(1)
            transfer.push(weights)
        counts_then, sizes_then = held(worker)
        for (fds_then, threads_then), (fds, threads) in zip(counts_then, counts, strict=True):
            assert fds_then <= fds and threads_then <= threads, (counts_then, counts)  # earlier tests' may have gone
        growth = [then - before for then, before in zip(sizes_then, sizes, strict=True)]
        assert max(growth) <= 12 * 2**20, f"230 pushes of 5 MiB took {growth} bytes"


@pytest.fixture
def without_garbage_collector():
    """What only a garbage collection frees stays, as in a process that allocates little between two of them."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def held():
    """This process's descriptors and threads."""
    process = psutil.Process()
    return process.num_fds(), process.num_threads()


def flat(before):
    """Whether this process holds no more than before, at once or before a deadline; what it holds."""
    deadline = time.monotonic() + TIMEOUT_S + SLACK_S
    while any(now > then for now, then in zip(held(), before, strict=True)) and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    return all(now <= then for now, then in zip(held(), before, strict=True)), (held(), before)


def fails_to_form(groups, end):
    """The errors with which these groups end when `end` is called while they wait for one more."""
    errors = []

    def meet(group):
        try:
            group.broadcast(TIMEOUT_S, 1, lambda index: torch.zeros(ALIGNMENT, dtype=torch.uint8))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=meet, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + TIMEOUT_S
    while any(group._store is None for group in groups) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    time.sleep(LOOK_S)
    end()
    for thread in threads:
        thread.join()
    assert [isinstance(error, ConnectionError) for error in errors] == [True] * len(groups), errors
    return errors


def test_a_group_that_is_closed_before_it_is_formed_says_that_it_was_given_up():
    group = TrainerGroup(Library.gloo, torch.device("cpu"), 2, "127.0.0.1")
    group.close()
    with pytest.raises(ConnectionAbortedError, match="gave the broadcast up"):
        group.broadcast(TIMEOUT_S, 1, lambda index: torch.zeros(ALIGNMENT, dtype=torch.uint8))


@pytest.mark.parametrize("end", ["give_up", pytest.param("close", marks=pytest.mark.slow)])
def test_groups_that_never_form_close_what_they_have_opened_also_while_somebody_keeps_the_error(
    end, without_garbage_collector
):
    kept, before = [], ()
    for _ in range(5):
        trainers = TrainerGroup(Library.gloo, torch.device("cpu"), 3, "127.0.0.1")
        workers = WorkerGroup(Library.gloo, torch.device("cpu"), "127.0.0.1", trainers.where)
        kept += fails_to_form([trainers, workers], getattr(trainers, end))
        if not before:  # what torch opens once for all
            time.sleep(LINGER_S + 4 * LOOK_S)
            gc.collect()
            kept, before = [], held()
    is_flat, seen = flat(before)
    assert is_flat and len(kept) == 8, seen


@pytest.mark.parametrize(
    "moment", [pytest.param("before the group is formed", marks=pytest.mark.slow), "in the fourth bucket"]
)
def test_workers_that_are_killed_leave_the_trainer_no_connections(moment, tmp_path, without_garbage_collector):
    with opened(GLOO, tmp_path, count=2) as (transfer, workers):
        small_buckets(transfer)
        workers[0].may_restart = True

        def kill():
            os.kill(workers[0].process.pid, signal.SIGKILL)

        before = ()
        for seed in range(4):
            if moment == "before the group is formed":
                workers[0].faults["update_weights"] = "die"
            else:
                before_bucket(transfer, 3, kill)
            transfer.push(plain(seed))
            assert transfer.last.restarts == 1
            transfer._publisher._drop_group()  # the one that has not failed
            if not before:
                time.sleep(LINGER_S + 4 * LOOK_S)
                gc.collect()
                before = held()[0], math.inf  # threads of a pool start when they are needed
        is_flat, seen = flat(before)
        assert is_flat, seen


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"bucket_mib": 0}, r"transfer\.bucket_mib must be between 1 and 65536 \(got 0\)"),
        ({"host": ""}, r"transfer\.host must be the one address that workers connect to \(got ''\)"),
        ({"host": "0.0.0.0"}, r"transfer\.host must be the one address"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(dials, message):
    with pytest.raises(ValueError, match=message):
        CollectiveConfig(sender=SENDER, **dials)


def test_buckets_are_larger_between_gpus():
    assert (GLOO.bucket_bytes, NCCL.bucket_bytes) == (64 * 2**20, 256 * 2**20)


def test_a_host_that_is_another_machine_is_refused_before_any_worker_is_asked_to_come(tmp_path):
    config = CollectiveConfig(sender=SENDER, host="192.0.2.1")
    with (
        pytest.raises(ValueError, match=re.escape("transfer.host must be an address of the trainer's machine")),
        in_process(config, tmp_path, PlainModel(0), plain(1)),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_nccl_without_a_gpu_is_refused_with_what_to_use(tmp_path):
    with pytest.raises(ValueError, match=r"torch sees none here: use transfer=gloo"):
        make_transfer(NCCL, tmp_path)
