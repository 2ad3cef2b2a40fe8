"""Workers that join a session that is open, and leave it: with real workers behind pipes."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from test_session import CONFIGS, LIVE, SENDER, opened
from worker_process import PlainModel, fingerprint, plain, worker_processes

from transfer import make_transfer
from transfer.agreement import wire
from transfer.config import DiskConfig, IpcConfig, Staging, Take
from transfer.trainer.fencing import Fence

LIVE_VIEW = IpcConfig(sender=SENDER, staging=Staging.live, take=Take.view)


@contextmanager
def newcomer(transfer, name="plain", **dials):
    """A worker that nobody has talked to yet."""
    with worker_processes(transfer.endpoint, name, 1, seed=77, **dials) as [worker]:
        yield worker


def holds(worker, version, seed):
    seen = worker.peek()
    return seen["version"] == version and seen["weights"] == fingerprint(plain(seed))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_newcomer_has_the_newest_version_before_anybody_asks_it_and_gets_every_later_one(name, tmp_path):
    with opened(CONFIGS[name], tmp_path) as (transfer, [first]), newcomer(transfer) as second:
        transfer.push(plain(1))
        transfer.push(plain(2))
        assert transfer.join(second) and holds(second, 1, 2) and holds(first, 1, 2)
        assert transfer.push(plain(3)) == 2
        assert holds(first, 2, 3) and holds(second, 2, 3)
        epoch, said = transfer.epoch, len(first.log)
        transfer.leave(first)
        assert [transfer.push(plain(seed)) for seed in (4, 5, 6)] == [3, 4, 5]
        assert holds(second, 5, 6) and transfer.epoch == epoch
        assert [verb for verb, _ in first.log[said:]] == [], "nothing is said any more to one that has left"


def test_where_the_bytes_are_gone_a_newcomer_gets_the_next_version_with_the_others(tmp_path):
    policy = PlainModel(1)
    with (
        opened(LIVE, tmp_path, weights=policy.state_dict(keep_vars=True)) as (transfer, _),
        newcomer(transfer) as second,
    ):
        transfer.push(policy.state_dict())
        assert not transfer.join(second) and second.peek()["version"] is None
        transfer.withdraw()
        with torch.no_grad():
            policy.first.bias.add_(1)
        assert transfer.push(policy.state_dict()) == 1
        assert second.peek()["version"] == 1 and second.peek()["weights"] == fingerprint(policy.state_dict())


@pytest.mark.parametrize("config", [CONFIGS["ipc view"], CONFIGS["gloo"], LIVE_VIEW], ids=["ipc", "gloo", "live view"])
@pytest.mark.parametrize("verb", ["init_weight_transfer_engine", "start_weight_update", "update_weights"])
def test_a_newcomer_that_dies_as_it_joins_is_named_and_harms_nobody(config, verb, tmp_path):
    policy = PlainModel(1)
    with ExitStack() as stack:
        weights = policy.state_dict(keep_vars=True)
        transfer, [first] = stack.enter_context(opened(config, tmp_path, weights=weights))
        second = stack.enter_context(newcomer(transfer))
        transfer.push(weights)
        epoch = transfer.epoch
        second.faults[verb] = "die"
        with pytest.raises(wire.TransferError, match=second.name):
            transfer.join(second)
        transfer.withdraw()
        assert transfer.push(weights) == 1 and transfer.epoch == epoch and first.peek()["version"] == 1


def test_a_newcomer_that_dies_as_it_joins_and_can_be_started_again_is_brought_there_all_the_same(tmp_path):
    with opened(CONFIGS["ipc view"], tmp_path) as (transfer, _), newcomer(transfer) as second:
        transfer.push(plain(1))
        second.may_restart = True
        second.faults["update_weights"] = "die"
        assert transfer.join(second) and holds(second, 0, 1)


def test_a_newcomer_with_another_model_is_refused_with_the_differences(tmp_path):
    with opened(CONFIGS["ipc view"], tmp_path) as (transfer, _), newcomer(transfer, hidden=6) as second:
        transfer.push(plain(1))
        with pytest.raises(ValueError, match=r"first\.weight"):
            transfer.join(second)
        assert transfer.push(plain(2)) == 1


def test_a_worker_of_another_trainer_is_refused_and_ours_are_not_taken_for_lost(tmp_path):
    ours, theirs = (DiskConfig(sender=SENDER, path=str(tmp_path / name)) for name in ("ours", "theirs"))
    with opened(ours, tmp_path) as (transfer, _), opened(theirs, tmp_path) as (other, [worker]):
        transfer.push(plain(1))
        other.push(plain(2))
        with pytest.raises(ValueError, match=r"has had another trainer \(epoch 1, version 0; ours are 1 and 0\)"):
            transfer.join(worker)
        assert transfer.push(plain(3)) == 1 and other.push(plain(4)) == 1


def test_another_trainer_that_is_faster_with_a_newcomer_does_not_end_this_one(tmp_path, monkeypatch):
    with opened(CONFIGS["ipc view"], tmp_path) as (transfer, _), newcomer(transfer) as second:
        transfer.push(plain(1))
        agree = Fence.agree

        def slower(fence, members):
            body = {"init_info": {**fence.terms, "trainer": "another", "epoch": fence.epoch}}
            second.call("init_weight_transfer_engine", body)
            return agree(fence, members)

        monkeypatch.setattr(Fence, "agree", slower)
        with pytest.raises(wire.TransferError, match="epoch 1 is taken"):
            transfer.join(second)
        monkeypatch.undo()
        assert transfer.push(plain(2)) == 1


def test_one_that_has_left_may_come_back_whether_or_not_it_has_missed_anything(tmp_path):
    with opened(CONFIGS["ipc copy"], tmp_path, count=2) as (transfer, [_, second]):
        transfer.push(plain(1))
        transfer.leave(second)
        assert transfer.join(second) and holds(second, 0, 1)
        transfer.leave(second)
        transfer.push(plain(2))
        assert transfer.join(second) and holds(second, 1, 2)


def test_one_that_serves_the_trainers_memory_is_told_to_stop_as_it_leaves_and_the_last_one_cannot_leave(tmp_path):
    policy = PlainModel(1)
    weights = policy.state_dict(keep_vars=True)
    with opened(LIVE_VIEW, tmp_path, count=2, weights=weights) as (transfer, [first, second]):
        transfer.push(weights)
        transfer.leave(second)
        assert second.peek()["version"] is None and first.peek()["version"] == 0
        assert not transfer.recover(second), "it is no concern of this session's"
        with pytest.raises(ValueError, match="the last one cannot leave"):
            transfer.leave(first)
        transfer.withdraw()
        assert transfer.push(weights) == 1


def test_nobody_joins_a_session_that_is_not_open(tmp_path):
    with (
        make_transfer(CONFIGS["ipc view"], tmp_path) as transfer,
        newcomer(transfer) as worker,
        pytest.raises(ValueError, match="open the transfer before"),
    ):
        transfer.join(worker)
