"""A small policy with its tokenizer, and a run of it."""

from __future__ import annotations

import pytest
from programs import ROWS, SMALL, brevity

import rlhf


@pytest.fixture(scope="session")
def folder_of_a_policy(tmp_path_factory):
    """What a run has left, for `from_pretrained`."""
    from rlhf.config import Device, TinyModelConfig
    from rlhf.models.policy import make_policy
    from rlhf.models.saving import save_model
    from rlhf.models.tokenizer import make_tokenizer

    config = TinyModelConfig(device=Device.cpu, layers=1, hidden=32, heads=2, intermediate=64)
    tokenizer = make_tokenizer(config, "say 0123456789qu", False)
    folder = tmp_path_factory.mktemp("policy")
    save_model(make_policy(config, tokenizer, 0), tokenizer, folder)
    return folder


@pytest.fixture
def policy(folder_of_a_policy):
    """A model of transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder_of_a_policy)


@pytest.fixture
def tokenizer(folder_of_a_policy):
    """And its tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder_of_a_policy)


@pytest.fixture
def train(tmp_path, policy, tokenizer):
    """`train("steps=3", data=..., ...)` trains the policy in `tmp_path / "run"`."""

    def run(*words, **objects):
        given = {"folder": tmp_path / "run", "policy": policy, "tokenizer": tokenizer, "data": ROWS, "rewards": brevity}
        return rlhf.train(rlhf.compose([*SMALL, *words]), **{**given, **objects})

    return run
