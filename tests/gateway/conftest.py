"""The endpoint before a policy of random weights, or before one that says what a test has it say."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
from talking import client_of, talking_policy, talking_tokenizer

from rlhf.gateway.calls import Calls, Limits
from rlhf.gateway.sampling import Sampling
from rlhf.gateway.server import serving
from rlhf.gateway.session import Bounds, Sessions, Terms
from rlhf.types import Completion


@pytest.fixture(scope="session")
def tokenizer():
    return talking_tokenizer()


@pytest.fixture(scope="session")
def policy(tokenizer):
    return talking_policy(tokenizer)


@pytest.fixture
def client(policy, tokenizer, tmp_path):
    with client_of(policy, tokenizer, tmp_path) as made:
        yield made


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
