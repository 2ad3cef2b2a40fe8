"""A session to a vLLM server that is reached by its own routes; the server is vllm_fake.py's."""

import dataclasses
from contextlib import ExitStack, contextmanager

import pytest
import torch
from vllm_fake import FakeVllm
from worker_process import PlainModel

from transfer import make_transfer
from transfer.agreement.journal import Journal
from transfer.agreement.manifest import Manifest
from transfer.agreement.protocol import Phase
from transfer.agreement.wire import TransferError
from transfer.config import HandlesConfig, HttpSenderConfig, IpcConfig, SenderConfig, Take
from transfer.trainer.senders.direct import DirectSender
from transfer.vllm.server_ends import ServerIntake, ServerLanding
from transfer.vllm.stock import RlhfIpc, StockIpc, StockServer, UpdatePolicy
from transfer.worker.receiver import Receiver

HANDLES = HandlesConfig(sender=HttpSenderConfig(timeout_s=5.0, url=["http://127.0.0.1:1"]))
MEMORY = IpcConfig(sender=SenderConfig(timeout_s=5.0), take=Take.copy)
VERSIONS = ("0.24.0", "0.33.1")


@contextmanager
def opened(config, folder, version):
    """A session, its receiver, the fake server and the trainer's module."""
    ours = isinstance(config, IpcConfig)
    module = PlainModel(0)
    with ExitStack() as stack:
        fake = stack.enter_context(
            FakeVllm(version, weights=dict(module.named_parameters()), backend="rlhf_ipc" if ours else "ipc")
        )
        transfer = stack.enter_context(make_transfer(config, folder))
        policy = UpdatePolicy(finite=not ours)
        server = StockServer(fake.url, 30.0, RlhfIpc() if ours else StockIpc(), policy)
        landing = ServerLanding(Manifest.of(module.state_dict()), server, module.named_parameters)
        receiver = Receiver(ServerIntake(transfer.endpoint, server, module.named_parameters), landing, Journal())
        stack.callback(receiver.close)
        transfer.open(module.state_dict(keep_vars=True), [DirectSender(receiver, "server")])
        yield transfer, receiver, fake, module


def grow(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)


@pytest.mark.parametrize("version", VERSIONS)
def test_handles_of_the_trainers_own_tensors_bring_every_version(version, tmp_path):
    with opened(HANDLES, tmp_path, version) as (transfer, receiver, fake, module):
        for number in range(3):
            grow(module)
            assert transfer.push(module.state_dict()) == number
            assert all(torch.equal(fake.weights[name], tensor) for name, tensor in module.named_parameters())
            assert receiver.version == number and not fake.paused
        assert fake.label == ("2" if version == "0.33.1" else "default")


@pytest.mark.parametrize("version", VERSIONS)
def test_our_backend_is_told_where_the_weights_are_and_their_digest(version, tmp_path):
    with opened(MEMORY, tmp_path, version) as (transfer, receiver, fake, module):
        (agreed,) = [body["init_info"] for _, path, body in fake.calls if path == "/init_weight_transfer_engine"]
        assert agreed.keys() == {"endpoint", "manifest", "where"} and agreed["endpoint"]["take"] == "copy"
        for _number in range(3):
            grow(module)
            transfer.push(module.state_dict())
        told = fake.infos[-1]
        assert told["version"] == 2 and told["where"].keys() == {"slot"} and told["digest"].startswith("xxh3:")
        starts = [body for _, path, body in fake.calls if path == "/start_weight_update"]
        assert starts == [{"is_checkpoint_format": False} if version == "0.24.0" else None] * 3
        assert receiver.version == 2


@pytest.mark.parametrize("step", ["/start_weight_update", "/update_weights", "/finish_weight_update"])
def test_a_server_that_fails_in_a_step_stays_paused_and_serves_nothing_until_an_update_succeeds(step, tmp_path):
    with opened(HANDLES, tmp_path, "0.33.1") as (transfer, receiver, fake, module):
        transfer.push(module.state_dict())
        fake.faults[step] = 500
        with pytest.raises(TransferError, match="kept paused"):
            transfer.push(module.state_dict())
        assert fake.paused and receiver.phase is Phase.QUARANTINED and receiver.version is None
        grow(module)
        fake.updating = False
        transfer.push(module.state_dict())
        assert not fake.paused and receiver.phase is Phase.READY and not fake.served_mixture


def test_a_digest_that_vllms_own_backend_could_not_compare_is_refused():
    from transfer.config import Verify

    with pytest.raises(ValueError, match="verify must be off"):
        dataclasses.replace(HANDLES, verify=Verify.digest)
