import threading

import pytest
import torch
from worker_process import OddModel, PlainModel, fingerprint, in_process, plain

from transfer import make_receiver, make_transfer
from transfer.agreement import wire
from transfer.agreement.manifest import Manifest
from transfer.config import DiskConfig, IpcConfig, SenderConfig, Take
from transfer.trainer.senders.direct import DirectSender
from transfer.worker.gate import Gate

SENDER = SenderConfig(timeout_s=20.0)
VIEW = IpcConfig(sender=SENDER)
COPY = IpcConfig(sender=SENDER, take=Take.copy)
DISK = DiskConfig(sender=SENDER)


def test_an_empty_worker_serves_nothing(tmp_path):
    with make_transfer(DISK, tmp_path) as transfer:
        receiver = make_receiver(transfer.endpoint, PlainModel(0))
        with pytest.raises(wire.Refused, match="this worker is empty") as caught, receiver.serving():
            pass
        assert caught.value.status == 503 and receiver.weight_info() == {"weight_version": None}


def test_every_parameter_that_shares_its_memory_gets_the_new_weights(tmp_path):
    class Shared(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.one = torch.nn.Parameter(torch.full((3,), value))
            self.two = torch.nn.Parameter(self.one.data)

    module = Shared(0.0)
    with in_process(VIEW, tmp_path, module, Shared(1.0).state_dict()) as (transfer, _):
        transfer.push(Shared(2.0).state_dict())
        assert module.one.tolist() == module.two.tolist() == [2.0] * 3


def test_an_error_while_weights_are_replaced_quarantines_until_the_next_push(tmp_path):
    module = PlainModel(seed=0)
    with in_process(COPY, tmp_path, module, plain(1)) as (transfer, receiver):
        transfer.push(plain(1))
        updates = receiver._updates
        replace = updates._write_weights

        def torn():
            updates._staged = {"first.bias": updates._staged["first.bias"]}
            replace()
            raise RuntimeError("the device fell off")

        updates._write_weights = torn
        with pytest.raises(wire.TransferError, match="finishing version 1: the device fell off"):
            transfer.push(plain(2))
        with pytest.raises(wire.Refused, match="quarantined") as caught, receiver.serving():
            pass
        assert caught.value.status == 503
        updates._write_weights = replace
        transfer.push(plain(3))
        with receiver.serving():
            assert fingerprint(module.state_dict()) == fingerprint(plain(3))


def test_generation_never_sees_weights_of_one_version_under_the_label_of_another(tmp_path):
    module = PlainModel(seed=0)
    seen, wrong, done = set(), [], threading.Event()
    with in_process(COPY, tmp_path, module, plain(0)) as (transfer, receiver):
        expected = [fingerprint(plain(version)) for version in range(20)]
        transfer.push(plain(0))

        def generate():
            while not done.is_set():
                with receiver.serving() as turn:
                    version = turn()
                    seen.add(version)
                    if fingerprint(module.state_dict()) != expected[version]:
                        wrong.append(version)

        threads = [threading.Thread(target=generate) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for version in range(1, 20):
                transfer.push(plain(version))
        finally:
            done.set()
            for thread in threads:
                thread.join(20)
    assert wrong == [] and len(seen) > 3


def test_the_gate_lets_the_waiting_flip_go_before_new_generation():
    gate, order = Gate(), []
    inside, waiting = threading.Event(), threading.Event()

    def flip():
        waiting.set()
        with gate.exclusive(20):
            order.append("flip")

    def generate():
        with gate.shared(20):
            order.append("generate")

    with gate.shared(20):
        threads = [threading.Thread(target=flip), threading.Thread(target=generate)]
        threads[0].start()
        assert waiting.wait(20)
        while not gate._exclusive:
            inside.wait(0.01)
        threads[1].start()
        inside.wait(0.05)
        assert order == []
    for thread in threads:
        thread.join(20)
    assert order == ["flip", "generate"]


def test_the_gate_opens_again_after_a_flip_that_waited_in_vain():
    gate = Gate()
    with gate.shared(1), pytest.raises(wire.Refused, match="completions are being generated"), gate.exclusive(0.01):
        pass
    with gate.shared(0.01), gate.shared(0.01):
        pass


def good_init(module):
    manifest = Manifest.of(module.state_dict()).to_json()
    return {"epoch": 1, "trainer": "t", "manifest": manifest, "timeout_s": 5.0, "where": {}}


BAD_BODIES = [
    ("init_weight_transfer_engine", {}),
    ("init_weight_transfer_engine", {"init_info": {"epoch": 1}}),
    (
        "init_weight_transfer_engine",
        {"init_info": {"epoch": 1, "trainer": "t", "manifest": {}, "timeout_s": 1, "where": {}}},
    ),
    (
        "init_weight_transfer_engine",
        {"init_info": {"epoch": -1, "trainer": "t", "manifest": {}, "timeout_s": 1, "where": {}}},
    ),
    ("init_weight_transfer_engine", {"init_info": {"packed": True}}),
    ("start_weight_update", {"epoch": 1}),
    ("start_weight_update", {"epoch": 1, "version": "0"}),
    ("start_weight_update", {"epoch": 1, "version": 0, "digest": 5}),
    ("start_weight_update", {"is_checkpoint_format": False}),
    ("start_weight_update", {"version": 1}),
    ("update_weights", {"update_info": []}),
    ("update_weights", {"update_info": {"epoch": 1, "version": 0, "where": {}, "path": "/etc/passwd"}}),
    ("update_weights", {"update_info": {"epoch": 1, "version": 0}}),
    ("finish_weight_update", {"epoch": 1, "weight_version": 0}),
    ("finish_weight_update", {"epoch": 1, "weight_version": "-1"}),
    ("finish_weight_update", {"epoch": 1}),
    ("abort_weight_update", {"epoch": 1}),
    ("abort_weight_update", {}),
    ("withdraw_weights", {"epoch": 1}),
    ("withdraw_weights", {"epoch": 0, "version": 0}),
]


@pytest.mark.parametrize("verb, body", BAD_BODIES)
def test_a_body_of_another_form_is_refused_with_422_and_changes_nothing(verb, body, tmp_path):
    with make_transfer(DISK, tmp_path) as transfer:
        receiver = make_receiver(transfer.endpoint, PlainModel(0))
        before = receiver.status()
        with pytest.raises(wire.Refused) as caught:
            getattr(receiver, verb)(body)
        assert caught.value.status == 422 and caught.value.reason
        assert receiver.status() == before


def test_an_abandoned_stage_is_dropped_when_its_lease_ends(tmp_path, monkeypatch):
    module = PlainModel(0)
    now = [1000.0]
    monkeypatch.setattr("transfer.worker.lease.now", lambda: now[0])
    with make_transfer(DISK, tmp_path) as transfer:
        receiver = make_receiver(transfer.endpoint, module)
        receiver.init_weight_transfer_engine({"init_info": good_init(module)})
        receiver.start_weight_update({"epoch": 1, "version": 0})
        assert receiver.status()["phase"] == "staging"
        now[0] += 10.0  # twice the trainer's deadline
        assert receiver.status()["phase"] == "empty"
        with pytest.raises(wire.Refused, match="no update is under way"):
            receiver.finish_weight_update({"epoch": 1, "weight_version": "0"})


def test_take_view_across_devices_names_the_setting_to_change(tmp_path):
    with make_transfer(VIEW, tmp_path) as transfer:
        receiver = make_receiver(transfer.endpoint, PlainModel(0))
        receiver._landing.device = torch.device("cuda", 0)  # as if its module were there
        with pytest.raises(ValueError, match=r"transfer.take=view needs .* use transfer.take=copy"):
            transfer.open(plain(1), [DirectSender(receiver, "worker 0")])


# --- vLLM's one-shot messages -----------------------------------------------------------------------------------------


def one_shot(pairs):
    """The update_info that a stock client sends, and what keeps its memory alive."""
    from transfer.engine.handles import Exporter
    from transfer.engine.ipc import _messages

    exporter = Exporter()
    return _messages(pairs, exporter, 1)[0], exporter


def test_one_message_without_start_is_a_whole_update(tmp_path):
    with make_transfer(VIEW, tmp_path) as transfer:
        module = OddModel(0)
        receiver = make_receiver(transfer.endpoint, module)
        receiver.init_weight_transfer_engine({"init_info": {}})
        for version in range(2):
            info, exporter = one_shot(OddModel(5 + version).named_parameters())
            with exporter:
                receiver.update_weights({"update_info": info})
            assert receiver.version == version
            assert torch.equal(module.head, OddModel(5 + version).embed) and module.head is module.embed


def test_chunks_between_start_and_finish_go_live_together_under_the_trainers_label(tmp_path):
    with make_transfer(VIEW, tmp_path) as transfer:
        module = PlainModel(0)
        receiver = make_receiver(transfer.endpoint, module)
        receiver.start_weight_update({"is_checkpoint_format": True})
        for name, weight in plain(4).items():
            info, exporter = one_shot([(name, weight)])
            with exporter:
                receiver.update_weights({"update_info": info})
            assert receiver.version is None and fingerprint(module.state_dict()) == fingerprint(plain(0))
        receiver.finish_weight_update({"weight_version": "42"})
        assert receiver.version == 42 and fingerprint(module.state_dict()) == fingerprint(plain(4))
        assert receiver.weight_info() == {"weight_version": "42"}


@pytest.mark.parametrize(
    "pairs, reason",
    [
        ([("first.weight", torch.zeros(7, 5))], "3 of 4 weights are missing"),
        ([("nobody", torch.zeros(1))], "no weight called nobody"),
        ([("first.bias", torch.zeros(8))], r"first.bias must be float32 \[7\]"),
        ([("first.bias", torch.zeros(7).bfloat16())], r"first.bias must be float32 \[7\]"),
    ],
)
def test_a_one_shot_update_that_does_not_fit_changes_nothing(pairs, reason, tmp_path):
    with make_transfer(VIEW, tmp_path) as transfer:
        module = PlainModel(0)
        receiver = make_receiver(transfer.endpoint, module)
        info, exporter = one_shot(pairs)
        with exporter, pytest.raises(wire.Refused, match=reason) as caught:
            receiver.update_weights({"update_info": info})
        assert caught.value.status == 422
        assert receiver.status()["phase"] == "empty"
        assert fingerprint(module.state_dict()) == fingerprint(plain(0))


def test_a_one_shot_message_is_refused_once_a_trainer_has_taken_an_epoch(tmp_path):
    with in_process(VIEW, tmp_path, PlainModel(0), plain(1)) as (transfer, receiver):
        transfer.push(plain(1))
        info, exporter = one_shot(plain(2).items())
        for verb, body in (
            ("update_weights", {"update_info": info}),
            ("start_weight_update", {}),
            ("finish_weight_update", {}),
        ):
            with pytest.raises(wire.Refused, match="epoch 0 is an older trainer's"):
                getattr(receiver, verb)(body)
        exporter.__exit__(None, None, None)
        assert transfer.push(plain(3)) == 1
