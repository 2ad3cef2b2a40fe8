"""New weights arrive while a real worker process samples: what becomes of its completions."""

import copy
import threading
import time

import pytest
import torch
from conftest import EOS, launched

from rlhf.config import HfRolloutConfig
from rlhf.rollout.client import RolloutClient
from rlhf.types import Prompt
from transfer.config import HttpSenderConfig, InFlight, IpcConfig

CONFIG = HfRolloutConfig(max_new_tokens=300, rows_per_request=2**14)
PROMPTS = [Prompt("x", (3, 4, 5 + index % 4)) for index in range(50)]


@pytest.fixture(scope="module")
def talkative(model):
    """A larger model with room for long answers, and a small probability of an end at each token."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    larger = AutoModelForCausalLM.from_config(Qwen3Config(**model.config.to_dict() | sizes | {"layer_types": None}))
    with torch.no_grad():
        larger.lm_head.weight[EOS] = 0
    return larger.eval()


@pytest.fixture
def later(talkative):
    """The model one gradient step later."""
    changed = copy.deepcopy(talkative)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.05)
    return changed


def until_it_samples(sender):
    deadline = time.monotonic() + 20
    while not sender.call("status", {})["serving"]:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def sampled_across(fleet, model, later, tokenizer):
    """Push `later` once sampling has begun: the rollouts, and whether sampling went on after the push was done."""
    (sender,) = fleet.feed(model)
    client = RolloutClient([sender], tokenizer, CONFIG)
    got = {}

    def sample():
        got["rollouts"] = client.sample(PROMPTS, n=16, temperature=1.0, seed=1)

    thread = threading.Thread(target=sample)
    thread.start()
    until_it_samples(sender)
    time.sleep(0.2)  # some answers end
    assert thread.is_alive(), "the push must come while the worker samples"
    assert fleet.transfer.push(later.state_dict()) == 1
    going_on = thread.is_alive()
    thread.join(60)
    return got["rollouts"], going_on


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", InFlight)
def test_completions_in_flight_end_or_start_again_or_go_on(in_flight, talkative, later, tokenizer, tmp_path):
    with launched(talkative, IpcConfig(sender=HttpSenderConfig()), tmp_path, in_flight=in_flight) as fleet:
        rollouts, going_on = sampled_across(fleet, talkative, later, tokenizer)
        after = RolloutClient(fleet.workers.senders(), tokenizer, CONFIG)
        undisturbed = after.sample(PROMPTS, n=16, temperature=1.0, seed=1)
    spans = {tuple(sorted(set(completion.versions))) for completion in rollouts.completions}
    assert all(list(c.versions) == sorted(c.versions) for c in rollouts.completions), "never back to older weights"
    assert {c.finish_reason for c in rollouts.completions} <= {"stop", "length"}
    assert set(undisturbed.lags(1)) == {0}
    if in_flight is InFlight.wait:
        assert spans == {(0,)}
    elif in_flight is InFlight.abort:
        assert spans == {(1,)} and going_on
        assert [c.ids for c in rollouts.completions] == [c.ids for c in undisturbed.completions]
    else:
        assert spans > {(0, 1)} and going_on
        assert 0 < sum(rollouts.lags(1)) < rollouts.tokens
