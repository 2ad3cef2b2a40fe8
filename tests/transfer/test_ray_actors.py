"""Ray actors as workers: what a sender tells them, and the one-shot API; one Ray for all."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from one_shot import DEADLINE_S, Loaded, digest, digests, receive, weights
from test_ipc_transports import memfds, send
from worker_process import PlainModel, fingerprint

import transfer as package
from transfer import make_receiver, make_transfer
from transfer.agreement import wire
from transfer.config import IpcConfig, SenderConfig
from transfer.engine import ipc
from transfer.engine.handles import Exporter
from transfer.trainer.senders.ray import RaySender

START_S = 240.0
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    folders = [str(Path(__file__).parent), str(Path(package.__file__).parent.parent)]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield ray
    ray.shutdown()


def started(*actors):
    """These, once their processes are up: on a busy machine that takes longer than any answer may."""
    import ray

    ray.get([actor.__ray_ready__.remote() for actor in actors], timeout=START_S)
    return actors


# --- senders ----------------------------------------------------------------------------------------------------------


class Actor:
    """A worker as a Ray actor."""

    def __init__(self, endpoint=None):
        torch.set_num_threads(1)
        if endpoint is not None:
            self.module = PlainModel(seed=99)
            self.receiver = make_receiver(endpoint, self.module)

    def health(self, body):
        return {"seen": body}

    def peek(self):
        return fingerprint(self.module.state_dict())

    def start_weight_update(self, body):
        return self.receiver.start_weight_update(body)

    def update_weights(self, body):
        return self.receiver.update_weights(body)

    def finish_weight_update(self, body):
        return self.receiver.finish_weight_update(body)

    def abort_weight_update(self, body):
        return self.receiver.abort_weight_update(body)

    def init_weight_transfer_engine(self, body):
        return self.receiver.init_weight_transfer_engine(body)

    def status(self, body):
        return self.receiver.status(body)

    def pause(self, body):
        raise wire.Refused(409, "not now")

    def resume(self, body):
        raise KeyError("a bug")

    def is_paused(self, body):
        threading.Event().wait(60)

    def version(self, body):
        return wire.Binary(b"\0\xff", wire.COLUMNS_TYPE)

    def completions(self, body):
        os._exit(9)


def test_a_ray_actor_answers_its_refusals_keep_their_status_and_its_death_is_an_error_with_status_0(ray):
    (actor,) = started(ray.remote(Actor).options(num_cpus=0, max_concurrency=2).remote())
    sender = RaySender(actor, "worker 3", 60.0)
    assert sender.call("health", {"a": 1}) == {"seen": {"a": 1}}
    assert sender.call("version", {}) == {wire.BODY: b"\0\xff"}
    with pytest.raises(wire.RemoteError, match=r"worker 3: pause: not now \(status 409\)"):
        sender.call("pause", {})
    with pytest.raises(wire.RemoteError, match=r"KeyError: 'a bug' \(status 500\)"):
        sender.call("resume", {})
    with pytest.raises(wire.RemoteError, match=r"no answer within 0\.2 s") as caught:
        sender.call("is_paused", {}, timeout_s=0.2)
    assert caught.value.status == 0
    with pytest.raises(wire.RemoteError, match="the actor is gone") as caught:
        sender.call("completions", {})
    assert caught.value.status == 0


@pytest.mark.slow
def test_updates_through_ray_arrive_in_shared_memory(ray, tmp_path):
    with make_transfer(IpcConfig(sender=SenderConfig()), tmp_path) as transfer:
        actors = started(*(ray.remote(Actor).options(num_cpus=0).remote(dict(transfer.endpoint)) for _ in range(2)))
        senders = [RaySender(actor, f"worker {i}", 60.0) for i, actor in enumerate(actors)]
        transfer.open(PlainModel(1).state_dict(), senders)
        for version in range(3):
            assert transfer.push(PlainModel(version).state_dict()) == version
            expected = fingerprint(PlainModel(version).state_dict())
            assert ray.get([actor.peek.remote() for actor in actors]) == [expected, expected]
        with pytest.raises(wire.RemoteError, match="epoch 2 is not initialised here") as caught:
            senders[0].call("start_weight_update", {"epoch": 2, "version": 9})
        assert caught.value.status == 409
        for actor in actors:
            ray.kill(actor)


# --- the one-shot API -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def actors(ray):
    """Two live actors with vLLM's `update_weights`."""
    return started(*(ray.remote(num_cpus=0)(OneShotActor).remote() for _ in range(2)))


class OneShotActor:
    """A Ray actor with the method that a trainer calls."""

    def __init__(self):
        self.loaded = Loaded()

    def update_weights(self, request):
        assert list(request) == ["update_info"]
        if request["update_info"]["names"] == ["slow"]:
            time.sleep(5)
        receive(request["update_info"], self.loaded.load_weights)

    def told(self):
        return digests(self.loaded.weights), memfds()


def told(actor):
    import ray

    return ray.get(actor.told.remote(), timeout=DEADLINE_S)


@pytest.mark.slow
def test_a_ray_actor_receives_weights_exactly(actors):
    sent = weights()
    send(sent, mode="ray", llm_handle=actors[0])
    assert told(actors[0]) == (digests(sent), 0)


@pytest.mark.slow
def test_a_list_of_ray_actors_receives_the_same_weights(actors):
    sent = weights()
    send(sent, mode="ray", llm_handle=actors)
    assert [told(actor) for actor in actors] == [(digests(sent), 0)] * 2


@pytest.mark.slow
def test_what_a_ray_actor_raises_reaches_the_trainer_after_all_have_answered(actors, monkeypatch):
    add = Exporter.add

    def for_the_second_only(self, name, tensor, receivers):
        return [{"GPU-elsewhere": ()}, *add(self, name, tensor, receivers)[1:]]

    monkeypatch.setattr(ipc.Exporter, "add", for_the_second_only)
    sent = {"only one": torch.randn(3)}
    with pytest.raises(ValueError, match="'only one': IPC handle not found for GPU UUID"):
        send(sent, mode="ray", llm_handle=actors)
    assert told(actors[1])[0]["only one"] == digest(sent["only one"])


@pytest.mark.slow
def test_a_ray_actor_that_does_not_answer_is_given_up_at_the_deadline(actors, monkeypatch):
    monkeypatch.setattr(ipc, "TIMEOUT_S", 0.2)
    with pytest.raises(TimeoutError, match=r"llm_handle \[0\] of 1 did not answer within 0.2 s"):
        send({"slow": torch.ones(1)}, mode="ray", llm_handle=actors[0])
