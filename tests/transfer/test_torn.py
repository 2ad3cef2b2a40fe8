"""Processes that are stopped in the middle of a copy, and go on when the others have: nobody serves a mixture."""

import dataclasses
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from test_server_ends import HANDLES, grow, opened
from test_vllm_engine import FusedModel, checkpoint, put, session
from worker_process import PlainModel, fingerprint

from transfer import make_receiver, make_transfer
from transfer.agreement import protocol, wire
from transfer.agreement.manifest import Manifest
from transfer.agreement.protocol import Phase
from transfer.backends.collective import CollectivePublisher
from transfer.config import CollectiveConfig, HttpSenderConfig, IpcConfig, SenderConfig, Staging, Take, Verify
from transfer.engine import ipc
from transfer.engine.handles import Exporter
from transfer.engine.pledge import KEY, Pledge
from transfer.trainer.senders.direct import DirectSender
from transfer.vllm.engine import RlhfIpcEngine
from transfer.vllm.stock import StockServer
from transfer.worker import lease

SENDER = SenderConfig(timeout_s=20.0)
LIVE = {
    verify.value: IpcConfig(sender=SENDER, staging=Staging.live, take=Take.copy, verify=verify) for verify in Verify
}
WAIT_S = 20.0


class AtOnce(DirectSender):
    """To a receiver in this process as if it were far away: a whole update in one message, to which no answer may come.

    `stopped`: once this is set nothing more is heard of the message that is being carried out, nor of later ones.
    """

    remote = True

    def __init__(self, receiver):
        super().__init__(receiver, "worker 0")
        self.stopped = threading.Event()
        self.late = []  # the messages without an answer

    def call(self, verb, body, timeout_s=None):
        if verb == "status":  # is answered at any time
            return super().call(verb, body)
        said = []

        def talk():
            try:
                said.append(DirectSender.call(self, verb, body))
            except wire.RemoteError as error:
                said.append(error)

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        while thread.is_alive() and not self.stopped.is_set():
            thread.join(0.001)
        if thread.is_alive():
            self.late.append(thread)
            raise wire.RemoteError(self.name, verb, 0, "no answer in time")
        if isinstance(said[0], Exception):
            raise said[0]
        return said[0]

    def hear(self):
        """Let all be carried out to its end, and be heard again."""
        for thread in self.late:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        self.stopped.clear()


class Stopped:
    """A tensor at which a copy is stopped until it is let go on."""

    def __init__(self, tensor, reached):
        self.go_on = threading.Event()
        self._tensor, self._reached = tensor, reached

    def copy_(self, source):
        self._reached.set()
        assert self.go_on.wait(WAIT_S)
        return self._tensor.copy_(source)


@contextmanager
def live(config, folder):
    """An open session to a receiver in this process; the policy, the sampler and the sender."""
    policy, sampler = PlainModel(1), PlainModel(2)
    with make_transfer(config, folder) as transfer:
        receiver = make_receiver(transfer.endpoint, sampler)
        sender = AtOnce(receiver)
        transfer.open(policy.state_dict(keep_vars=True), [sender])
        yield transfer, receiver, policy, sampler, sender


@contextmanager
def stopped_at(receiver, sender, name):
    """Inside, the next copy stops at the tensor with this name, and nothing is heard of it; then it goes on."""
    tensors = receiver._landing._tensors
    whole = tensors[name]
    tensors[name] = [Stopped(whole[0], sender.stopped)]
    try:
        yield
    finally:
        [stopped], tensors[name] = tensors[name], whole
        stopped.go_on.set()
        sender.hear()


def step(policy):
    """A gradient step: all of the trainer's values change in place."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)


@pytest.mark.parametrize("verify", ["off", "digest"])
@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_a_worker_stopped_in_its_copy_serves_nothing_if_the_trainer_went_on_meanwhile(verify, name, tmp_path):
    with live(LIVE[verify], tmp_path) as (transfer, receiver, policy, sampler, sender):
        transfer.push(policy.state_dict())
        with stopped_at(receiver, sender, name):
            step(policy)
            with pytest.raises(wire.TransferError, match="no answer in time"):
                transfer.push(policy.state_dict())
            step(policy)  # the trainer has caught the error, and trains on
        with pytest.raises(wire.Refused, match="quarantined"), receiver.serving():
            pass
        version = transfer.push(policy.state_dict())
        with receiver.serving():
            assert receiver.version == version and fingerprint(sampler.state_dict()) == fingerprint(policy.state_dict())


def test_a_message_that_comes_late_does_not_put_later_weights_under_an_earlier_label(tmp_path):
    with live(LIVE["off"], tmp_path) as (transfer, receiver, policy, _, sender):
        transfer.push(policy.state_dict())
        late = {"epoch": transfer.epoch, "version": 1, "where": {"slot": 0}, "finish": True}
        sender.stopped.set()  # the worker is stopped before it has read the message
        receiver._standing._verbs.acquire()
        step(policy)
        with pytest.raises(wire.TransferError, match="no answer in time"):
            transfer.push(policy.state_dict())
        step(policy)
        receiver._standing._verbs.release()
        sender.hear()
        assert receiver.phase is Phase.QUARANTINED and receiver.version is None
        with pytest.raises(wire.Refused, match="the trainer has gone on"):
            receiver.start_weight_update(late)
        with pytest.raises(wire.Refused, match="quarantined"), receiver.serving():
            pass


def test_what_was_copied_while_the_trainer_still_waited_is_served_though_its_answer_was_lost(tmp_path):
    with live(LIVE["off"], tmp_path) as (transfer, receiver, policy, sampler, sender):
        transfer.push(policy.state_dict())
        step(policy)
        finish = receiver._standing.noted

        def noted(op, *arguments):
            finish(op, *arguments)
            if op == "finish":
                sender.stopped.set()
                while not sender.late:
                    time.sleep(0.001)

        receiver._standing.noted = noted
        assert transfer.push(policy.state_dict()) == 1
        assert receiver.version == 1 and fingerprint(sampler.state_dict()) == fingerprint(policy.state_dict())


def test_a_copy_that_ends_after_its_lease_is_not_served_whatever_the_trainer_does(tmp_path, monkeypatch):
    with live(LIVE["off"], tmp_path) as (transfer, receiver, policy, _, _):
        copy = receiver._landing.copy

        def slow(*arguments):
            digest = copy(*arguments)
            now = lease.now()
            monkeypatch.setattr(lease, "now", lambda: now + 2 * SENDER.timeout_s)
            return digest

        receiver._landing.copy = slow
        with pytest.raises(
            wire.TransferError, match="the lease of the update has ended before its weights were copied"
        ):
            transfer.push(policy.state_dict())
        assert receiver.version is None and receiver.phase is Phase.QUARANTINED


def test_leases_count_the_time_that_the_machine_sleeps(monkeypatch):
    before = lease.now()
    gettime = time.clock_gettime
    slept = {time.CLOCK_BOOTTIME: 3600.0}
    monkeypatch.setattr(time, "clock_gettime", lambda clock: gettime(clock) + slept.get(clock, 0.0))
    assert 3600.0 <= lease.now() - before < 3660.0


def test_a_finish_renews_the_lease_under_which_it_copies(tmp_path):
    with live(LIVE["off"], tmp_path) as (transfer, receiver, policy, _, _):
        ends = []
        copy, step_ = receiver._landing.copy, receiver._standing.step

        def stepping(message):
            state, decision = step_(message)
            if isinstance(message, protocol.Finish):
                ends.append(state.deadline)
            return state, decision

        def copying(*arguments):
            ends.append(receiver._standing.state.deadline)
            return copy(*arguments)

        receiver._standing.step, receiver._landing.copy = stepping, copying
        transfer.push(policy.state_dict())
        assert len(ends) == 2 and ends[0] == ends[1]


# --- inside vLLM ------------------------------------------------------------------------------------------------------


def test_a_vllm_rank_that_is_stopped_in_its_copy_serves_nothing_if_the_trainer_went_on(tmp_path):
    model, weights = FusedModel(), checkpoint(0)
    with session(LIVE["off"], tmp_path, model, weights=weights) as (transfer, receiver, rank):
        transfer.push(weights)
        replay = next(iter(rank._replays.values()))
        run = replay.run

        def late(*arguments):
            transfer._publisher.release()  # as at the end of a push that was given up
            put(weights, 1)
            return run(*arguments)

        replay.run = late
        with pytest.raises(wire.TransferError, match="the trainer has gone on"):
            transfer.push(weights)
        assert receiver.version is None and receiver.phase is Phase.QUARANTINED
        replay.run = run
        transfer.push(weights)
        assert receiver.phase is Phase.READY


def test_our_engine_in_a_vllm_server_refuses_to_finish_what_it_copied_too_late(tmp_path):
    from test_vllm_engine import OwnWay, same

    from transfer.backends.arena import LivePublisher
    from transfer.vllm.rank import RankWeights

    model, weights = FusedModel(), checkpoint(0)
    engine = RlhfIpcEngine("config", "parallel", model)
    engine._rank = RankWeights(model, torch.device("cpu"), OwnWay(model))
    publisher = LivePublisher(LIVE["off"])
    try:
        where = publisher.prepare(Manifest.of(weights), weights)
        told = {"endpoint": publisher.endpoint, "manifest": Manifest.of(weights).to_json(), "where": where}
        engine.init_transfer_engine(engine.parse_init_info(told))
        slot, _ = publisher.write(0, weights, (), False)
        engine.receive_weights(engine.parse_update_info({"version": 0, "where": slot}))
        engine.finish_weight_update()
        slot, _ = publisher.write(1, weights, (), False)
        publisher.release()
        with pytest.raises(ValueError, match="the weights are torn"):
            engine.receive_weights(engine.parse_update_info({"version": 1, "where": slot}))
        with pytest.raises(RuntimeError, match="torn"):
            engine.finish_weight_update()
        put(weights, 3)
        slot, _ = publisher.write(2, weights, (), False)
        engine.receive_weights(engine.parse_update_info({"version": 2, "where": slot}))
        engine.finish_weight_update()
        assert same(model, 3)
    finally:
        engine.shutdown()
        publisher.close()


def test_a_thread_that_lags_behind_its_push_gives_a_server_no_later_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("transfer.trainer.fleet.GRACE_S", 0.1)
    config = dataclasses.replace(HANDLES, sender=HttpSenderConfig(timeout_s=0.2, url=["http://127.0.0.1:1"]))
    with opened(config, tmp_path, "0.33.1") as (transfer, receiver, fake, module):
        go_on, verified = threading.Event(), StockServer.verified

        def late(*arguments):
            go_on.wait(0.8)
            return verified(*arguments)

        monkeypatch.setattr(StockServer, "verified", late)
        pushed = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
        with pytest.raises(wire.TransferError, match="its sender does not come back"):
            transfer.push(module.state_dict())
        grow(module)  # the trainer has caught the error, and trains on
        go_on.set()
        with receiver._standing.alone():
            assert fake.paused or all(torch.equal(fake.weights[name], pushed[name]) for name in pushed)


# --- one call ---------------------------------------------------------------------------------------------------------


def pledged(pairs):
    """A one-shot message as its trainer sends it for GPU memory, the exporter, and the trainer's word."""
    exporter, pledge = Exporter(), Pledge()
    message = ipc._messages(pairs, exporter, 1)[0]
    message["ipc_handles"][0][KEY] = pledge.claim
    return message, exporter, pledge


def test_a_one_shot_update_read_while_its_trainer_waits_is_served(tmp_path):
    module = PlainModel(0)
    message, exporter, pledge = pledged(PlainModel(1).state_dict().items())
    with make_transfer(HANDLES, tmp_path) as transfer, exporter:
        receiver = make_receiver({"backend": "local"}, module)
        receiver.update_weights({"update_info": message})
        pledge.close()
        assert receiver.version == 0 and fingerprint(module.state_dict()) == fingerprint(PlainModel(1).state_dict())
        assert transfer.endpoint["backend"] == "local"


def test_a_one_shot_update_read_after_its_trainer_went_on_is_not_served():
    receiver = make_receiver({"backend": "local"}, PlainModel(0))
    message, exporter, pledge = pledged(PlainModel(1).state_dict().items())
    with exporter:
        pledge.close()
        with pytest.raises(wire.Refused, match=r"the trainer, process .*, has gone on before its weights were read"):
            receiver.update_weights({"update_info": message})
        again = Pledge()  # the same descriptor's number
        assert again.claim[2] == pledge.claim[2]
        with pytest.raises(wire.Refused, match="has gone on"):
            receiver.update_weights({"update_info": message})
        again.close()
    assert receiver.version is None


def test_an_engine_stopped_while_it_reads_one_call_says_that_what_it_loaded_may_be_a_mixture():
    message, exporter, pledge = pledged(PlainModel(1).state_dict().items())
    engine, loaded = ipc.IPCWeightTransferEngine(None, None), []

    def load_weights(pairs):
        loaded.extend(name for name, _ in pairs)
        if len(loaded) == 2:  # stopped here, until the trainer has given it up
            pledge.close()

    with exporter, pytest.raises(ValueError, match="may have changed meanwhile"):
        engine.receive_weights(engine.parse_update_info(message), load_weights)
    assert len(loaded) == 4


@pytest.mark.parametrize(
    "claim", ["pledge", ("pledge", 1, 2), ("else", 1, 2, 3), ("pledge", "1", 2, 3), ("pledge", -1, 2, 3)]
)
def test_a_pledge_of_another_form_is_refused(claim):
    message, exporter, pledge = pledged(PlainModel(1).state_dict().items())
    message["ipc_handles"][0][KEY] = claim
    engine = ipc.IPCWeightTransferEngine(None, None)
    with exporter, pytest.raises(ValueError, match="a handle's pledge must be"):
        engine.receive_weights(engine.parse_update_info(message), list)
    pledge.close()


# --- a broadcast ------------------------------------------------------------------------------------------------------


def test_a_broadcast_that_lags_behind_its_push_sends_no_later_weights(tmp_path):
    weights = {"w": torch.zeros(4)}
    publisher = CollectivePublisher(CollectiveConfig(sender=SENDER))
    try:
        publisher.prepare(Manifest.of(weights), weights)
        publisher.write(0, weights, (), False)
        publisher.alongside(0, ["worker"])
        count, pack = publisher._packed()
        assert count == 1 and not pack(0).any()
        publisher.release()
        weights["w"].fill_(1.0)
        with pytest.raises(ConnectionAbortedError, match="the trainer has gone on"):
            pack(0)
    finally:
        publisher.close()


def test_a_push_waits_for_the_bucket_that_is_being_packed():
    from transfer.backends.hold import Hold

    hold, inside, go_on, ended = Hold(), threading.Event(), threading.Event(), threading.Event()

    def read():
        with hold.reading():
            inside.set()
            go_on.wait(WAIT_S)

    def end():
        hold.end()
        ended.set()

    reader, ender = threading.Thread(target=read), threading.Thread(target=end)
    reader.start()
    assert inside.wait(WAIT_S)
    ender.start()
    assert not ended.wait(0.1), "it waits"
    go_on.set()
    reader.join(WAIT_S)
    assert ended.wait(WAIT_S)
    with pytest.raises(ConnectionAbortedError), hold.reading():
        pass
