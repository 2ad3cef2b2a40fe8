"""Agents of a few lines, and a policy of random weights that talks to them."""

from __future__ import annotations

import shlex
import sys

import pytest
from talking import client_of, talking_policy, talking_tokenizer

from rlhf.agents.environment import AgentEnvironment
from rlhf.config.task import AgentTaskConfig
from rlhf.episodes.loop import conversing
from rlhf.types import Prompt

HELPERS = """
import json, os, subprocess, sys, time, urllib.request

given = os.environ["RLHF_ROW"]
row = json.loads(open(given[1:]).read() if given.startswith("@") else given)

def post(url, body):
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request, timeout=60))

def ask(messages, **more):
    body = {"messages": messages, **more}
    return post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body)["choices"][0]["message"]

def reward(number):
    post(os.environ["RLHF_SESSION"] + "/reward", {"reward": number})
"""


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


@pytest.fixture
def script(tmp_path):
    """`script(code)`: the command of an agent that does that, with the helpers above."""

    def written(code: str) -> str:
        path = tmp_path / "agent.py"
        path.write_text(HELPERS + code)
        return f"{shlex.quote(sys.executable)} -S {path}"

    return written


@pytest.fixture
def agents(client, tokenizer, script):
    """`agents(code, **dials)`: what samples them."""

    def made(code, **dials):
        config = AgentTaskConfig(path="rows.jsonl", command=script(code), **dials)
        return conversing(client, AgentEnvironment(config, tokenizer))

    return made


@pytest.fixture
def prompt(tokenizer):
    """`prompt(text, **columns)`: a row's."""

    def made(text, **columns):
        messages = [{"role": "user", "content": text}]
        rendered = f"<|user|>{text}<|assistant|>"
        return Prompt(rendered, tuple(tokenizer.encode(rendered, add_special_tokens=False)), columns, messages)

    return made
