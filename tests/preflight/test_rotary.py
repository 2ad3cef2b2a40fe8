"""Rows that cross the length at which a model's rotary factors change are refused before anything is trained."""

import pytest
import torch

from rlhf.config import TinyModelConfig, VllmRolloutConfig
from rlhf.learning.pass_choice import random_batch
from rlhf.learning.passes import PADDED
from rlhf.models.saving import save_model
from rlhf.models.tokenizer import make_tokenizer
from rlhf.preflight.agreement import engine_logprobs
from rlhf.preflight.rotary import change_of, check_rotary
from rlhf.run import run
from tests.benchmarks.tiny_families import tiny

CHANGE = 16
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 3.0, 9.0, 27.0],
}
SETTINGS = {"rope_parameters": LONG, "original_max_position_embeddings": CHANGE, "max_position_embeddings": 64}
RUN = ("experiment=checkpoint", "transfer=local", "task=arithmetic", "task.held_out=4", "steps=1", "logger=jsonl")
FEW = ("prompts_per_step=2", "samples_per_prompt=2")


def gap(responses: list[int]) -> float:
    """Between engine and learner, in nats, for a prompt of 8 tokens."""
    model = tiny("phi3", **SETTINGS)
    batch = random_batch(model, [8], [0] * len(responses), responses)
    with torch.no_grad():
        return float(((engine_logprobs(model, batch) - PADDED.logprobs(model, batch, 1.0)) * batch.mask_BT).abs().max())


def test_engine_and_learner_agree_up_to_the_change_and_not_beyond():
    assert gap([CHANGE - 8, 3]) < 1e-5
    assert gap([CHANGE - 8 + 4, 3]) > 1e-3


def test_the_length_is_that_of_longrope_alone_also_by_kind_of_layer():
    assert change_of(tiny("phi3", **SETTINGS)) == CHANGE
    assert (
        change_of(tiny("llama")) is None and change_of(tiny("mamba")) is None and change_of(tiny("gemma3_text")) is None
    )
    by_kind = tiny("gemma3_text")
    by_kind.config.rope_parameters = {"full_attention": LONG | {"original_max_position_embeddings": 24}}
    assert change_of(by_kind) == 24


@pytest.fixture
def checkpoint(tmp_path):
    save_model(
        tiny("phi3", **SETTINGS), make_tokenizer(TinyModelConfig(), "0123456789+-= ", chat=False), tmp_path / "model"
    )
    return f"model.path={tmp_path}/model"


def test_a_run_whose_rows_can_cross_it_is_refused_in_one_line(compose_run, tmp_path, checkpoint):
    with pytest.raises(
        ValueError, match=rf"do not fit the model's context of {CHANGE} tokens.*; beyond {CHANGE} tokens "
    ) as e:
        run(compose_run(*RUN, *FEW, checkpoint, "rollout.max_new_tokens=14"), tmp_path / "run")
    assert "\n" not in str(e.value) and not list(tmp_path.rglob("metrics.jsonl"))
    run(compose_run(*RUN, *FEW, checkpoint, "rollout.max_new_tokens=4"), tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "allowed"), [({}, False), ({"max_model_len": 17}, False), ({"max_model_len": 16}, True)]
)
def test_vllm_must_be_told_to_take_the_short_factors(compose_run, arguments, allowed):
    config = compose_run(*RUN, "model.path=x")
    config.rollout = VllmRolloutConfig(engine_args=arguments)
    if allowed:
        check_rotary(config, CHANGE)
        return
    with pytest.raises(ValueError, match=r"unless rollout\.engine_args\.max_model_len is at most 16 \(got "):
        check_rotary(config, CHANGE)
