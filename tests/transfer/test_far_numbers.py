"""Versions and epochs that somebody says by mistake, or on purpose: there is always a next one."""

from contextlib import contextmanager

import pytest
import torch

from transfer import make_receiver, make_transfer
from transfer.agreement import wire
from transfer.agreement.protocol import (
    AHEAD,
    Abort,
    Do,
    Finish,
    Init,
    Refuse,
    Rename,
    Repeat,
    Start,
    State,
    Update,
    Withdraw,
    step,
)
from transfer.config import HttpSenderConfig, IpcConfig
from transfer.trainer.senders.direct import DirectSender

FAR = [AHEAD + 10, 10**18, 2**63, 2**64 - 1]


def stepped(state, *messages):
    """The state after these messages, all of which are carried out."""
    for message in messages:
        state, decision = step(state, message, 0.0, 10.0)
        assert isinstance(decision, Do | Repeat), decision
    return state


READY = State(epoch=1, trainer="t", version=3, digest="d")
STAGING = stepped(READY, Start(1, 4, "e"), Update(1, 4))


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("state", [State(epoch=1, trainer="t"), READY])
def test_a_number_far_beyond_the_last_is_refused_and_changes_nothing(state, far):
    for message in (Start(1, far, "d"), Withdraw(1, far), Init(far, "u")):
        after, decision = step(state, message, 0.0, 10.0)
        assert isinstance(decision, Refuse) and after == state
        assert "too far beyond" in decision.reason and str(AHEAD) in decision.reason
    after, decision = step(STAGING, Rename(1, far), 0.0, 10.0)
    assert isinstance(decision, Refuse) and after == STAGING


def test_numbers_may_be_left_out_up_to_a_bound_that_no_trainer_reaches():
    fresh = stepped(State(), Init(AHEAD, "t"), Start(AHEAD, AHEAD, "d"))
    assert (fresh.epoch, fresh.target) == (AHEAD, AHEAD)
    assert stepped(READY, Start(1, 3 + AHEAD, "d")).target == 3 + AHEAD
    assert stepped(READY, Withdraw(1, 3 + AHEAD), Start(1, 3 + 2 * AHEAD)).target == 3 + 2 * AHEAD
    assert isinstance(step(READY, Start(1, 4 + AHEAD, "d"), 0.0, 10.0)[1], Refuse)


def test_after_the_highest_number_that_is_let_in_the_next_one_is_let_in_too():
    state = stepped(State(), Init(AHEAD, "t"))
    for _ in range(50):
        version = (state.version or 0) + AHEAD
        state = stepped(state, Init(state.epoch + AHEAD, "t"), Start(state.epoch + AHEAD, version, "d"))
        state = stepped(state, Update(state.epoch, version))
        assert isinstance(step(state, Finish(state.epoch, version), 0.0, 10.0)[1], Do)
        state = State(epoch=state.epoch, trainer="t", version=version, digest="d")
    after = stepped(state, Init(state.epoch + 1, "u"), Start(state.epoch + 1, state.version + 1, "e"))
    assert after.target == state.version + 1 < 2**64
    assert stepped(after, Abort(after.epoch, after.target)).target is None


@contextmanager
def pair(tmp_path):
    """A session and the receiver that it pushes to."""
    trained, sampler = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    with make_transfer(IpcConfig(sender=HttpSenderConfig()), tmp_path) as transfer:
        worker = make_receiver(transfer.endpoint, sampler)
        sender = DirectSender(worker, "worker 0")
        transfer.open(trained.state_dict(), [sender])
        transfer.push(trained.state_dict())
        yield transfer, trained, sampler, worker, sender


def strangers(worker, transfer, number):
    """Messages with this number, of somebody who has the worker's token and knows the epoch."""
    epoch = worker.status()["epoch"]
    where = {"slot": 0}
    yield worker.withdraw_weights, {"epoch": epoch, "version": number}
    yield worker.abort_weight_update, {"epoch": epoch, "version": number}
    yield worker.start_weight_update, {"epoch": epoch, "version": number, "where": where, "finish": True}
    yield worker.start_weight_update, {"epoch": epoch, "version": number}
    yield worker.update_weights, {"update_info": {"epoch": epoch, "version": number, "where": where}}
    yield worker.finish_weight_update, {"epoch": epoch, "weight_version": str(number)}
    info = {"epoch": number, "trainer": "stranger", "timeout_s": 5.0, "verify": "off", "in_flight": "wait"}
    agreed = {key: transfer._fence.terms[key] for key in ("manifest", "where")}
    yield worker.init_weight_transfer_engine, {"init_info": info | agreed}


@pytest.mark.parametrize("number", [*FAR, AHEAD, AHEAD - 1, 10**6])
def test_whatever_number_a_stranger_says_a_trainers_next_session_brings_its_weights(tmp_path, number):
    with pair(tmp_path) as (transfer, trained, sampler, worker, sender):
        for call, body in strangers(worker, transfer, number):
            try:
                call(body)
            except wire.Refused as refusal:
                assert refusal.status in (409, 422)
            with torch.no_grad():
                trained.weight.add_(1.0)
            transfer.open(trained.state_dict(), [sender])
            version = transfer.push(trained.state_dict())
            assert worker.version == version and torch.equal(sampler.weight, trained.weight)
