"""A policy of random weights that talks in characters, behind the endpoint."""

from __future__ import annotations

import string
import threading
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import torch

from rlhf.config import HfRolloutConfig, TinyModelConfig
from rlhf.gateway.calls import Calls, Limits
from rlhf.gateway.sampling import Sampling
from rlhf.gateway.server import serving
from rlhf.gateway.session import Bounds, Sessions, Terms
from rlhf.models.policy import make_policy
from rlhf.models.tokenizer import make_tokenizer
from rlhf.rollout.client import RolloutClient, Wanted
from rlhf.rollout.worker import Worker
from rlhf.types import Completion
from transfer import make_transfer
from transfer.config import LocalConfig
from transfer.trainer.senders.direct import DirectSender

MODEL = TinyModelConfig(hidden=16, layers=1, heads=2, context=512)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer(MODEL, string.printable, chat=True, tags=["tools", "tool_calls", "tool"])


@pytest.fixture(scope="session")
def policy(tokenizer):
    torch.set_num_threads(1)
    model = make_policy(MODEL, tokenizer, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # far from uniform,
        model.lm_head.weight[tokenizer.eos_token_id].mul_(4)  # and sometimes at an end
    return model.eval()


@pytest.fixture
def client(policy, tokenizer, tmp_path):
    """Of one worker in this process."""
    with make_transfer(LocalConfig(), tmp_path) as transfer:
        senders = [DirectSender(Worker.around(policy, transfer.endpoint), "worker 0")]
        transfer.open(policy.state_dict(keep_vars=True), senders)
        transfer.push(policy.state_dict())
        config = HfRolloutConfig(max_new_tokens=12, temperature=0.7)
        yield RolloutClient(senders, tokenizer, config, wanted=wanted_of_policy(policy))


def wanted_of_policy(policy):
    shape = policy.config.get_text_config()
    return Wanted(True, shape.vocab_size, shape.max_position_embeddings)


FREE = Bounds()


class Endpoint:
    """A server, and the sessions behind it."""

    def __init__(self, url, sessions):
        self.url, self.sessions = url, sessions

    def begin(self, seed=5, sample=0, temperature=0.7, bounds=FREE, within_s=60.0):
        """A session, its key, and a client of the package openai with it."""
        import openai

        session, key = self.sessions.begin(Terms(seed, sample, temperature, (0.7,)), bounds, within_s)
        return session, key, openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)


@contextmanager
def served(tokenizer, ask, limits, tool_format=None):
    sessions = Sessions()
    with serving(sessions, Calls(tokenizer, ask, limits, tool_format), "127.0.0.1") as url:
        yield Endpoint(url, sessions)


@pytest.fixture
def endpoint(client, tokenizer):
    """The endpoint before the worker, which a thread samples for."""
    sampling, done = Sampling(client), threading.Event()

    def sample():
        while not done.is_set():
            sampling.go_on(0.02)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        with served(tokenizer, sampling.ask, Limits(12, client.wanted.context, client.wanted.vocabulary)) as made:
            yield made
    finally:
        done.set()
        thread.join(30)
        sampling.close()


@pytest.fixture
def scripted(tokenizer):
    """`scripted(answers)`: a context with the endpoint before a policy that says these, one after the other."""

    def made(answers, **dials):
        said = iter(answers)

        def ask(wanted):
            future = Future()
            texts = [next(said) for _ in range(wanted.n)]
            future.set_result([_completion(tokenizer, text) for text in texts])
            return future

        return served(tokenizer, ask, Limits(4096, None, None), **dials)

    return made


def _completion(tokenizer, text):
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return Completion(ids, [-0.5] * len(ids), [7] * len(ids), "stop")
