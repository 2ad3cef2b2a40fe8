"""Sharded weights by a broadcast of each rank: what arrives, and what holds when a rank or a worker fails meanwhile."""

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rank_processes import ITSELF, Decoder, Worker, trainer
from test_shards import pushed_by_one, texts

from transfer.agreement import wire
from transfer.agreement.manifest import ALIGNMENT, Manifest
from transfer.agreement.shards import rows_of
from transfer.backends import rank_calls
from transfer.backends.buckets import Packer, begin_in, shares_of, unpack
from transfer.backends.collective_intake import CollectiveIntake, OfRanks
from transfer.backends.hold import Hold
from transfer.backends.rank_calls import Answering, Calls, Wire
from transfer.config import CollectiveConfig, SenderConfig, Take, Verify
from transfer.memory.regions import HostRegion, tensors

TIMEOUT_S = 60.0
SENDER = SenderConfig(timeout_s=TIMEOUT_S)
SOON_S = 20.0  # on a busy machine; what waits for a deadline takes longer
GLOO = CollectiveConfig(sender=SENDER)
LOOPBACK = "127.0.0.1"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def manifest_of(tied, dtype=torch.float32):
    return Manifest.of(Decoder(0, tied, dtype).state_dict())


# --- what is sent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 64])
@pytest.mark.parametrize("size", [ALIGNMENT, 2 * ALIGNMENT, 2**20])
def test_the_shares_of_all_ranks_are_every_byte_once_each_from_the_rank_that_holds_it(ranks, size):
    weights = {
        **{k: v.clone() for k, v in Decoder(1, tied=False, hidden=17).state_dict().items()},
        "z": torch.randn(67, 3, dtype=torch.complex128),
        "y": torch.randn(65).bfloat16(),
    }
    manifest = Manifest.of(weights)
    whole = ["layers.0.input_layernorm", "steps"]
    block = torch.zeros(manifest.nbytes, dtype=torch.uint8)
    packers = []
    for rank in range(ranks):
        held = {}
        for name, tensor in weights.items():
            first, end = (0, 0) if name in whole or not tensor.dim() else rows_of(len(tensor), ranks, rank)
            held[name] = tensor if not rank and end == 0 else tensor[first:end] if tensor.dim() else tensor
        begin = lambda entry, rank=rank: (  # noqa: E731
            0 if entry.name in whole or not entry.shape else begin_in(entry, ranks, rank)
        )
        packers.append(Packer(held, Hold(), begin))
    shares = shares_of(manifest, size, ranks, whole)
    assert [(share.bucket, share.rank) for share in shares] == sorted({(s.bucket, s.rank) for s in shares})
    for share in shares:
        assert 0 < share.nbytes <= size
        packed = torch.full((share.nbytes,), 255, dtype=torch.uint8)
        packers[share.rank].pack(share.pieces, packed)
        unpack(share, packed, block)
    assert sum(last - first for share in shares for _, first, last, _ in share.pieces) == sum(
        entry.nbytes for entry in manifest.entries
    )
    for entry in manifest.entries:
        mine = block[entry.offset : entry.offset + entry.nbytes].view(entry.torch_dtype).view(entry.shape)
        assert torch.equal(mine, weights[entry.name])


@pytest.mark.parametrize(
    "ranks, tied, dtype, take",
    [
        (2, True, torch.bfloat16, Take.view),
        slow(3, False, torch.float32, Take.copy),
        slow(3, True, torch.float32, Take.view),
    ],
)
def test_shards_arrive_as_if_one_process_had_pushed_also_in_a_worker_that_was_started_again(
    ranks, tied, dtype, take, tmp_path
):
    with trainer(ranks, tmp_path, seed=1, tied=tied) as ours:
        endpoint = ours.call("make", config=CollectiveConfig(sender=SENDER, take=take))[0]
        with Worker(endpoint, tmp_path, manifest_of(tied, dtype)) as worker:
            ours.call("open", url=worker.url)
            for version in range(3):
                ours.call("buckets_of", size=2**20 if version == 0 else ALIGNMENT)
                pushed = ours.call("push")
                assert [each[0] for each in pushed] == [version] * ranks and len({each[1:] for each in pushed}) == 1
                expected = pushed_by_one(1, tied, tmp_path / str(version), version, dtype)
                assert worker.status()["digest"] == expected and worker.serves() == (version, expected)
                ours.call("withdraw")
                if version < 2:
                    ours.call("train")
            url = worker.restart()
            assert ours.outcomes("recover", of=[0], url=url) == [("gives", True)], "whatever the other ranks do"
            assert worker.serves() == (2, expected)
            ours.call("train")
            url = worker.restart()
            assert ours.outcomes("recover", of=[0], url=url) == [("gives", False)], "the rows are others by now"
            assert {each[0] for each in ours.call("push")} == {3}
            assert worker.serves() == (3, pushed_by_one(1, tied, tmp_path / "3", 3, dtype))


@pytest.mark.parametrize(
    "verify, take", [(Verify.off, Take.view), slow(Verify.full, Take.copy), slow(Verify.full, Take.view)]
)
def test_a_worker_has_every_rank_s_rows_to_the_bit_and_messages_stay_small(verify, take, tmp_path):
    config = CollectiveConfig(sender=SENDER, take=take, verify=verify)
    with trainer(3, tmp_path, seed=3, tied=False) as ours:
        ours.call("make", config=config)
        ours.call("open_here")
        ours.call("buckets_of", size=ALIGNMENT)
        for _ in range(3):
            assert len(ours.call("differing")[0]) > 10
            ours.call("push")
            assert ours.call("differing") == [[]] * 3
            ours.call("train")
        told = ours.call("control_bytes")
        assert 0 < told[0] < 3 * 400 and told == [told[0]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("take", [Take.view, Take.copy])
def test_the_sums_that_ranks_on_gpus_add_up_are_those_that_a_worker_finds(take, tmp_path):
    config = CollectiveConfig(sender=SENDER, take=take, verify=Verify.full)
    with trainer(3, tmp_path, seed=3, tied=False) as ours:
        endpoint = ours.call("make", config=config)[0]
        with Worker(endpoint, tmp_path, manifest_of(tied=False)) as worker:
            ours.call("open", url=worker.url)
            ours.call("sums_instead")
            for version in range(2):
                ours.call("push")
                assert worker.status()["digest"].startswith("sums:")
                assert worker.serves() == (version, pushed_by_one(3, False, tmp_path / str(version), version))
                ours.call("train")


on_gpus = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
beside = pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs a third CUDA device")


@pytest.mark.parametrize(
    "device, library",
    [
        pytest.param("cuda", "nccl", marks=[*on_gpus, beside]),
        pytest.param("cuda", "gloo", marks=on_gpus),
        slow("cpu", "gloo"),
    ],
)
def test_rows_of_ranks_with_gpus_of_their_own_arrive_also_around_kills_of_a_worker_and_of_a_rank(
    device, library, tmp_path
):
    command = [sys.executable, str(Path(__file__).with_name("gpu_ranks.py")), str(tmp_path), device, library]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0 and ended.stdout.splitlines()[-1] == "ok", ended.stdout + ended.stderr


def test_whole_tensors_that_all_ranks_have_are_sent_by_the_first_alone(tmp_path):
    with trainer(2, tmp_path, sharded=False, seed=1, tied=True) as ours:
        endpoint = ours.call("make", config=GLOO)[0]
        with Worker(endpoint, tmp_path, manifest_of(tied=True)) as worker:
            ours.call("open", url=worker.url)
            for version in range(2):
                assert [each[0] for each in ours.call("push")] == [version] * 2
                assert worker.serves() == (version, pushed_by_one(1, True, tmp_path / str(version), version))
                ours.call("train")


# --- what fails, in all ranks alike -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_value_that_is_not_finite_in_one_rank_alone_fails_the_push_in_all_and_nothing_is_sent(tmp_path):
    with trainer(2, tmp_path, seed=1, tied=False) as ours:
        endpoint = ours.call("make", config=GLOO)[0]
        with Worker(endpoint, tmp_path, manifest_of(tied=False)) as worker:
            ours.call("open", url=worker.url)
            ours.call("push")
            before = worker.serves()
            ours.call("spoil", rank=1, name="lm_head.weight")
            said = texts(ours.errors("push"))
            assert said == "version 1: lm_head.weight has values that are not finite; nothing was sent"
            assert worker.serves() == before


@pytest.mark.parametrize("rank, during", [slow(1, "_say_rows"), slow(0, "broadcast"), (1, "broadcast")])
def test_an_error_in_one_rank_while_it_sends_is_told_to_all_and_the_next_push_succeeds(rank, during, tmp_path):
    with trainer(2, tmp_path, seed=1, tied=False) as ours:
        endpoint = ours.call("make", config=GLOO)[0]
        with Worker(endpoint, tmp_path, manifest_of(tied=False)) as worker:
            ours.call("open", url=worker.url)
            ours.call("buckets_of", size=ALIGNMENT)
            ours.call("push")
            before = worker.serves()
            ours.call("harm", rank=rank, during=during)
            began = time.monotonic()
            said = texts(ours.errors("push"))
            assert time.monotonic() - began < SOON_S
            assert "a fault of the test" in said and ("rank 1: " in said) == (rank == 1)
            assert worker.serves() == before
            ours.call("train")
            (version,) = {each[0] for each in ours.call("push")}
            assert version > 0 and worker.serves() == (version, pushed_by_one(1, False, tmp_path / "one", 1))


@pytest.mark.parametrize("rank, during", [slow(2, "_say_rows"), slow(0, "broadcast"), (2, "broadcast")])
def test_a_rank_that_is_killed_while_it_sends_ends_the_push_in_the_others_and_the_worker_keeps_its_version(
    rank, during, tmp_path
):
    with trainer(3, tmp_path, patience_s=10.0, seed=1, tied=True) as ours:
        endpoint = ours.call("make", config=GLOO)[0]
        with Worker(endpoint, tmp_path, manifest_of(tied=True)) as worker:
            ours.call("open", url=worker.url)
            ours.call("buckets_of", size=ALIGNMENT)
            ours.call("push")
            served = worker.serves()
            ours.call("harm", rank=rank, during=during, pid=ITSELF)
            began = time.monotonic()
            for each in range(3):
                ours.begin("push", each)
            outcomes = [ours.outcome(0)] if rank else []
            ours.kill(0)  # as a trainer ends that cannot go on
            outcomes += [ours.outcome(each) for each in {1, 2} - {rank}]
            assert time.monotonic() - began < SOON_S
            for kind, said in outcomes:
                assert kind == "raises" and said.startswith("TransferError") and "have lost each other" in said
            assert worker.serves() == served
            deadline = time.monotonic() + SOON_S
            while worker.status()["phase"] != "ready":
                assert time.monotonic() < deadline, "the worker still waits for a rank that is gone"
                time.sleep(0.02)


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_receives_ends_the_push_in_all_and_gets_the_next_one(tmp_path):
    with trainer(2, tmp_path, seed=1, tied=True) as ours:
        endpoint = ours.call("make", config=GLOO)[0]
        with Worker(endpoint, tmp_path, manifest_of(tied=True)) as worker:
            ours.call("open", url=worker.url)
            ours.call("buckets_of", size=ALIGNMENT)
            ours.call("push")
            ours.call("harm", rank=1, during="broadcast", pid=worker.process.pid)
            began = time.monotonic()
            assert "worker 0" in texts(ours.errors("push"))
            assert time.monotonic() - began < SOON_S
            ours.call("train")
            assert ours.outcomes("recover", of=[0], url=worker.restart()) == [("gives", False)], "nobody has version 0"
            (version,) = {each[0] for each in ours.call("push")}
            assert worker.serves() == (version, pushed_by_one(1, True, tmp_path / "one", 1))


@pytest.mark.slow
def test_a_rank_that_lags_behind_its_push_sends_nothing_of_later_weights_even_if_nobody_verifies(tmp_path):
    config = CollectiveConfig(sender=SenderConfig(timeout_s=1.0), verify=Verify.off)
    with trainer(2, tmp_path, seed=1, tied=True) as ours:
        endpoint = ours.call("make", config=config)[0]
        with Worker(endpoint, tmp_path, manifest_of(tied=True)) as worker:
            ours.call("open", url=worker.url)
            ours.call("buckets_of", size=ALIGNMENT)
            ours.call("push")
            served = worker.serves()
            ours.call("harm", rank=1, during="broadcast", sleep_s=6.0)
            began = time.monotonic()
            texts(ours.errors("push"))
            assert time.monotonic() - began < 5.5
            ours.call("train")
            time.sleep(max(0.0, began + 7.0 - time.monotonic()))
            assert worker.serves() == served
            (version,) = {each[0] for each in ours.call("push")}
            assert worker.serves() == (version, pushed_by_one(1, True, tmp_path / "one", 1))


@pytest.mark.slow
def test_transfers_that_are_opened_again_leave_no_connections_and_threads(tmp_path):
    with trainer(2, tmp_path, seed=1, tied=True) as ours:
        endpoint = ours.call("make", config=GLOO)[0]
        with Worker(endpoint, tmp_path, manifest_of(tied=True)) as worker:
            for number in range(8):
                ours.call("open", url=worker.url)
                ours.call("push")
                if number == 2:
                    time.sleep(0.3)  # in which threads that look after a broadcast end
                    before = ours.call("held")
            deadline = time.monotonic() + SOON_S
            while any(now > then for now, then in zip(ours.call("held"), before, strict=True)):
                assert time.monotonic() < deadline, (ours.call("held"), before)
                time.sleep(0.1)


# --- what the ranks ask each other ------------------------------------------------------------------------------------


class Asked:
    """The first rank's end, and so many others that answer in this process."""

    def __init__(self, act, count=2, patience_s=2.0):
        self.calls = Calls(LOOPBACK, patience_s)
        self.others = [Answering(self.calls.where, rank, act) for rank in range(1, count)]
        self.calls.meet(count)

    def __enter__(self):
        return self.calls

    def __exit__(self, *exception):
        self.calls.close()
        for other in self.others:
            other.close()


def test_a_stranger_is_not_let_in_and_nobody_once_all_have_come():
    calls = Calls(LOOPBACK, 2.0)
    place = (LOOPBACK, calls.where["port"])
    strangers = []
    for said in ({"key": "x", "rank": 1}, {"key": calls.where["key"], "rank": 2}, {"rank": True}):
        strangers.append(Wire(socket.create_connection(place), 2.0))
        strangers[-1].say(said)
    other = Answering(calls.where, 1, lambda request, say: {"is": request["what"]})
    calls.meet(2)
    with calls.call({"what": 7}) as call:
        assert [said["is"] for said in call.answers()] == [7]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(place)
    for stranger in strangers:
        with pytest.raises(OSError, match=r"ended|reset"):
            stranger.hear()
    calls.close()
    other.close()


def test_bytes_come_in_order_and_what_is_left_of_a_call_that_broke_off_is_passed_over():
    rows = torch.arange(100, dtype=torch.uint8)

    def act(request, say):
        for part in rows.split(30):
            say({}, part)
        return {"end": request["call"]}

    with Asked(act, count=3) as calls:
        with pytest.raises(KeyError), calls.call({}):
            raise KeyError("the first rank's own")
        with calls.call({}) as call:
            for rank in (1, 2):
                got = torch.zeros(100, dtype=torch.uint8)
                for part in got.split(30):
                    call.take(rank, part)
                assert torch.equal(got, rows)
            assert [said["end"] for said in call.answers()] == [2, 2]


def test_what_a_rank_cannot_do_names_it_and_one_that_is_gone_ends_every_later_call():
    def act(request, say):
        if request["do"] == "fail":
            raise ValueError("no such rows")
        if request["do"] == "wait":
            time.sleep(3.0)
        return {}

    asked = Asked(act, patience_s=0.3)
    with asked as calls:
        with pytest.raises(OSError, match=r"\Arank 1: no such rows\Z"), calls.call({"do": "fail"}) as call:
            call.answers()
        with calls.call({"do": "nothing"}) as call:
            assert len(call.answers()) == 1
        late = r"rank 1 has said nothing for 0\.3 s"
        with pytest.raises(ConnectionError, match=late), calls.call({"do": "wait"}) as call:
            call.answers()
        assert calls.lost is not None
    asked = Asked(act)
    with asked as calls:
        asked.others[0].close()
        for _ in range(2):
            with pytest.raises(ConnectionError, match="rank 1 is gone"), calls.call({"do": "nothing"}) as call:
                call.answers()


def test_the_first_rank_s_part_is_given_up_as_soon_as_another_fails_and_the_cause_is_what_is_raised():
    given_up = threading.Event()

    def work():
        assert given_up.wait(5.0)
        raise ConnectionAbortedError("given up")

    def act(request, say):
        raise RuntimeError("the cause")

    with (
        Asked(act) as calls,
        pytest.raises(OSError, match=r"\Arank 1: the cause\Z"),
        calls.call({}) as call,
    ):
        call.beside(work, given_up.set, 5.0)


def test_a_rank_that_needs_longer_than_the_first_has_the_time_of_the_broadcast_and_no_more(monkeypatch):
    monkeypatch.setattr(rank_calls, "HEAR_S", 0.1)
    over = threading.Event()

    def act(request, say):
        over.wait(request["s"])
        return {}

    with Asked(act) as calls:
        with calls.call({"s": 0.5}) as call:
            call.beside(lambda: None, lambda: None, 20.0)
        with pytest.raises(OSError, match=r"\Arank 1 does not come back\Z"), calls.call({"s": 20.0}) as call:
            call.beside(lambda: None, lambda: None, 0.2)
        over.set()


# --- what a worker refuses --------------------------------------------------------------------------------------------


def test_a_worker_refuses_what_cannot_come_of_ranks():
    manifest = Manifest.of({"w": torch.zeros(5, 2), "n": torch.zeros(3)})
    intake = CollectiveIntake({"backend": "gloo", "host": LOOPBACK, "take": "view"})
    host = torch.device("cpu")
    for where, said in (
        ({"ranks": 0}, r"where\.ranks has a value that is not allowed"),
        ({"ranks": 2, "whole": [1]}, r"where\.whole has a value"),
    ):
        with pytest.raises(wire.Refused, match=said):
            intake.prepare(manifest, where, host)
    with pytest.raises(ValueError, match=r"where\.whole names tensors that are not here: m"):
        intake.prepare(manifest, {"ranks": 2, "whole": ["m"]}, host)
    intake.prepare(manifest, {"ranks": 3, "whole": ["n"], "timeout_s": 1.0}, host)
    with pytest.raises(wire.Refused, match=r"where\.world must be more than the 3 of the trainer \(got 3\)"):
        intake.stage(0, {"bucket": ALIGNMENT, "port": 9, "nonce": "0" * 32, "world": 3})


def test_rows_lie_where_the_slots_of_all_ranks_would_have_them():
    manifest = Manifest.of({"a": torch.zeros(5, 2), "b": torch.zeros(()), "c": torch.zeros(1, 3), "d": torch.zeros(0)})
    region = HostRegion(manifest.nbytes)
    staged = OfRanks(manifest, 3, []).staged(tensors(region, manifest, 0))
    assert [len(part) for part in staged["a"].parts] == [2, 2, 1] and staged["a"].whole.shape == (5, 2)
    assert staged["a"].places == (0, 4096, 8192), "a page for each rank"
    assert (staged["b"].places, staged["c"].places, staged["d"].places) == ((ALIGNMENT,), (2 * ALIGNMENT,), ())
    region.close()
