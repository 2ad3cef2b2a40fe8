import gzip
import json
import threading
import time
from pathlib import Path

import pytest

from rlhf.rollout.build import architecture_of, build_model
from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.worker import Worker
from rlhf.rollout.worker import _around as around
from transfer import make_transfer
from transfer.agreement.wire import ROUTES, Refused, TransferError
from transfer.config import InFlight, LocalConfig
from transfer.trainer.senders.direct import DirectSender

ASK = {"prompt": [[3, 4, 5]], "n": 2, "max_tokens": 50, "seeds": [1], "stop_token_ids": [], "logprobs": 0}


@pytest.fixture
def worker(local_worker, model):
    worker, transfer = local_worker
    transfer.open(model.state_dict(), [DirectSender(worker, "worker 0")])
    transfer.push(model.state_dict())
    return worker


class Generating:
    """A completion that runs in a thread until it is let go; the model's forward tells when it has begun."""

    def __init__(self, worker, model):
        self.begun, self.go = threading.Event(), threading.Event()
        self._hook = model.register_forward_pre_hook(self._hold)
        self._thread = threading.Thread(target=self._run, args=(worker,))

    def __enter__(self):
        self._thread.start()
        assert self.begun.wait(20)
        return self

    def __exit__(self, *_):
        self.end()
        self._hook.remove()

    def _hold(self, *_):
        self.begun.set()
        assert self.go.wait(20)

    def _run(self, worker):
        self.answer = worker.completions(ASK)

    def end(self):
        self.go.set()
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.answer


def until_paused(worker):
    deadline = time.monotonic() + 20
    while not worker.is_paused({})["is_paused"]:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_worker_has_a_method_for_every_route():
    assert all(callable(getattr(Worker, verb)) for verb in ROUTES)


def test_without_an_update_nothing_is_sampled(local_worker):
    worker, _ = local_worker
    with pytest.raises(Refused) as refusal:
        worker.completions(ASK)
    assert refusal.value.status == 503


def test_choices_carry_the_version_that_sampled_them(worker):
    assert [choice["weight_version"] for choice in worker.completions(ASK)["choices"]] == [0, 0]


def test_a_paused_worker_refuses_until_it_is_resumed(worker):
    assert worker.pause({"mode": "wait", "clear_cache": True}) == {"status": "paused"}
    assert worker.is_paused({}) == {"is_paused": True}
    with pytest.raises(Refused, match="paused") as refusal:
        worker.completions(ASK)
    assert refusal.value.status == 503
    worker.resume({})
    assert worker.is_paused({}) == {"is_paused": False}
    assert len(worker.completions(ASK)["choices"]) == 2


def test_a_paused_worker_is_resumed_only_with_whole_weights(worker, local_worker, model, monkeypatch):
    _, transfer = local_worker
    worker.pause({})
    with monkeypatch.context() as broken:
        broken.setattr(worker._receiver._updates, "_write_weights", lambda: 1 / 0)
        with pytest.raises(TransferError, match="division by zero"):
            transfer.push(model.state_dict())
    assert worker.status({})["phase"] == "quarantined"
    with pytest.raises(Refused, match="finish one before resuming") as refused:
        worker.resume({})
    assert refused.value.status == 409
    transfer.push(model.state_dict())
    worker.resume({})
    assert [choice["weight_version"] for choice in worker.completions(ASK)["choices"]] == [2, 2]


def test_a_sleeping_worker_serves_only_after_it_is_woken_up_and_with_the_same_weights(worker):
    before = worker.completions({"prompt": [3, 4], "temperature": 0.0})
    assert worker.sleep({"level": "1"}) == worker.is_sleeping({}) == {"is_sleeping": True}
    with pytest.raises(Refused, match="paused") as refused:
        worker.completions({"prompt": [3, 4]})
    assert refused.value.status == 503
    with pytest.raises(Refused, match="wake it up first"):
        worker.resume({})
    assert worker.wake_up({"tags": "weights"}) == worker.is_sleeping({}) == {"is_sleeping": False}
    assert worker.completions({"prompt": [3, 4], "temperature": 0.0}) == before


def test_a_deeper_sleep_than_the_engine_has_is_refused(worker):
    with pytest.raises(Refused, match="level"):
        worker.sleep({"level": 2})
    assert worker.is_sleeping({}) == {"is_sleeping": False}


def test_the_version_says_that_this_is_no_vllm(worker):
    assert worker.version({})["version"].startswith("rlhf-transfer ")


def test_pausing_with_abort_cuts_a_running_completion_short(worker, model):
    with Generating(worker, model) as running:
        pausing = threading.Thread(target=worker.pause, args=({"mode": "abort"},))
        pausing.start()
        until_paused(worker)
        answer = running.end()
        pausing.join(20)
        assert not pausing.is_alive()
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"abort"}
    assert {len(choice["token_ids"]) for choice in answer["choices"]} == {1}


def test_pausing_with_wait_returns_when_the_running_completion_has_ended(worker, model):
    with Generating(worker, model) as running:
        pausing = threading.Thread(target=worker.pause, args=({"mode": "wait"},))
        pausing.start()
        until_paused(worker)
        assert pausing.is_alive()
        answer = running.end()
        pausing.join(20)
        assert not pausing.is_alive()
    assert {len(choice["token_ids"]) for choice in answer["choices"]} == {50}


def test_pausing_with_keep_returns_at_once_and_the_running_completion_ends_whole(worker, model):
    with Generating(worker, model) as running:
        worker.pause({"mode": "keep"})
        answer = running.end()
    assert {len(choice["token_ids"]) for choice in answer["choices"]} == {50}


def test_weights_do_not_change_while_a_completion_runs(worker, local_worker, model):
    _, transfer = local_worker
    with Generating(worker, model) as running:
        pushing = threading.Thread(target=transfer.push, args=(model.state_dict(),))
        pushing.start()
        pushing.join(0.2)
        assert worker.weight_info({}) == {"weight_version": "0"}
        answer = running.end()
        pushing.join(20)
    assert {choice["weight_version"] for choice in answer["choices"]} == {0}
    assert worker.weight_info({}) == {"weight_version": "1"}


@pytest.mark.parametrize("verb", ["pause", "resume", "is_paused", "health", "get_world_size", "completions"])
def test_an_unknown_field_is_refused(worker, verb):
    with pytest.raises(Refused, match=r"body\.surprise") as refusal:
        getattr(worker, verb)({"surprise": 1})
    assert refusal.value.status == 422


def test_a_pause_of_another_mode_is_refused(worker):
    with pytest.raises(Refused, match=r"body\.mode"):
        worker.pause({"mode": ["abort"]})


def test_a_spec_survives_json_and_builds_the_same_architecture(model):
    spec = WorkerSpec(architecture=architecture_of(model), endpoint={"backend": "local"}, dtype="bfloat16", token="t")
    again = WorkerSpec.from_json(spec.to_json())
    assert again == spec
    built = build_model(again)
    shapes = {name: (tensor.shape, "torch.bfloat16") for name, tensor in model.state_dict().items()}
    assert {name: (tensor.shape, str(tensor.dtype)) for name, tensor in built.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("{", "strict JSON"),
        ("{}", "lacks"),
        ('{"architecture": {"model_type": "qwen3"}, "endpoint": {}, "colour": 1}', "colour"),
        ('{"architecture": {}, "endpoint": {}}', "model_type"),
        ('{"architecture": {"model_type": "qwen3"}, "endpoint": {}, "dtype": "float8"}', "dtype"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(raw, message):
    with pytest.raises(ValueError, match=message):
        WorkerSpec.from_json(raw)


def test_a_worker_traces_its_own_process_into_the_folder_of_its_run(model, tmp_path, local_worker):
    _, transfer = local_worker
    worker = Worker(*around(model, transfer.endpoint, ""), tmp_path / "worker-0.log")
    transfer.open(model.state_dict(), [DirectSender(worker, "worker 0")])
    transfer.push(model.state_dict())
    assert worker.start_profile({"step": 3}) == {"is_profiling": True}
    with pytest.raises(Refused, match="stop it first"):
        worker.start_profile({})
    worker.completions({**ASK, "max_tokens": 2})
    assert worker.stop_profile({}) == {"is_profiling": False, "said": ""}
    events = json.loads(gzip.decompress((tmp_path / "profile" / "step-3-worker-0.json.gz").read_bytes()))["traceEvents"]
    assert "aten::linear" in {event.get("name") for event in events}


def test_a_worker_in_the_trainer_s_process_traces_nothing_and_names_no_memory_as_its_own(worker, monkeypatch):
    monkeypatch.setattr("rlhf.rollout.worker.gpu_peak", lambda: 5.0)
    with pytest.raises(Refused, match="no process or no run's folder of its own") as refused:
        worker.start_profile({"step": 1})
    assert refused.value.status == 409 and "gpu_memory_mib" not in worker.status({})


def test_a_worker_with_a_process_of_its_own_says_how_much_of_a_gpu_it_has_taken(local_worker, model, monkeypatch):
    _, transfer = local_worker
    worker = Worker(*around(model, transfer.endpoint, ""), Path("worker-0.log"))
    assert "gpu_memory_mib" not in worker.status({}), "it has none"
    monkeypatch.setattr("rlhf.rollout.worker.gpu_peak", lambda: 5.0)
    assert worker.status({})["gpu_memory_mib"] == 5.0


@pytest.mark.parametrize("in_flight", InFlight)
def test_an_engine_is_told_whether_new_weights_wait_for_a_completion(in_flight, model, tmp_path):
    with make_transfer(LocalConfig(), tmp_path, in_flight) as transfer:
        worker = Worker.around(model, transfer.endpoint)
        transfer.open(model.state_dict(), [DirectSender(worker, "worker 0")])
        transfer.push(model.state_dict())
        told, generate = [], worker._engine.generate
        worker._engine.generate = lambda *request: told.append(request[2].steady) or generate(*request)
        worker.completions(ASK)
    assert told == [in_flight is InFlight.wait]
