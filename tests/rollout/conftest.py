"""Tiny models, and workers around them that hold weights."""

from __future__ import annotations

from contextlib import closing, contextmanager

import pytest
import torch

from rlhf.config import (
    AdamWConfig,
    HfRolloutConfig,
    RunConfig,
    SortTaskConfig,
    TinyModelConfig,
    VerifierRewardConfig,
)
from rlhf.config.algo import AlgoConfig
from rlhf.config.trainer import OneConfig
from rlhf.rollout.launch import Workers
from rlhf.rollout.spec_of_run import JOURNALS, worker_spec
from rlhf.rollout.worker import Worker
from transfer import make_transfer
from transfer.agreement.journal import Journal
from transfer.config import HttpSenderConfig, InFlight, IpcConfig, LocalConfig

EOS = 1
VOCABULARY = 12


class LetterTokenizer:
    """Ids 2, 3, ... are the letters a, b, ...; 0 pads and 1 ends, which are special: _ and $."""

    eos_token_id = EOS
    pad_token_id = 0

    def batch_decode(self, sequences, skip_special_tokens=False):
        special = "" if skip_special_tokens else "_$"
        return [
            "".join(special[token : token + 1] if token <= EOS else chr(95 + token) for token in ids)
            for ids in sequences
        ]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def tokenizer():
    return LetterTokenizer()


@pytest.fixture(scope="session")
def model():
    """A one-layer Qwen3 whose random weights are large enough for distributions far from uniform; not to be changed."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.5,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def run_config(transfer, workers=1):
    return RunConfig(
        task=SortTaskConfig(),
        model=TinyModelConfig(),
        rollout=HfRolloutConfig(workers=workers, max_new_tokens=10),
        reward=VerifierRewardConfig(),
        algo=AlgoConfig(name="grpo", advantage="group_norm"),
        optim=AdamWConfig(),
        transfer=transfer,
        trainer=OneConfig(),
    )


class Fleet:
    """A run's workers with the transfer session that feeds them; `spec` is what they were built from."""

    def __init__(self, transfer, workers, spec):
        self.transfer, self.workers, self.spec = transfer, workers, spec

    def feed(self, model):
        """The senders of the workers, once they hold the weights of `model`."""
        senders = self.workers.senders()
        self.transfer.open(model.state_dict(), senders)
        self.transfer.push(model.state_dict())
        return senders


@contextmanager
def launched(model, transfer_config, folder, workers=1, in_flight=InFlight.wait):
    config = run_config(transfer_config, workers)
    with (
        closing(Journal(folder / JOURNALS / "trainer.jsonl")) as journal,
        make_transfer(config.transfer, folder, in_flight, journal) as transfer,
    ):
        spec = worker_spec(model, config, transfer.endpoint)
        with Workers(spec, config, folder, model) as started:
            yield Fleet(transfer, started, spec)


@pytest.fixture
def launch(model, tmp_path):
    """Starts workers, which are still without weights: `with launch(transfer_config, workers=2) as fleet`."""
    return lambda transfer_config, workers=1: launched(model, transfer_config, tmp_path, workers)


@pytest.fixture(scope="session")
def http_fleet(model, tmp_path_factory):
    """One worker process that holds weights, shared by tests that change nothing in it."""
    config = IpcConfig(sender=HttpSenderConfig())
    with launched(model, config, tmp_path_factory.mktemp("http")) as fleet:
        fleet.feed(model)
        yield fleet


@pytest.fixture
def local_worker(model, tmp_path):
    """A worker in this process around `model`, without weights, and the session that would label them."""
    with make_transfer(LocalConfig(), tmp_path) as transfer:
        yield Worker.around(model, transfer.endpoint), transfer
