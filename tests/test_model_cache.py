"""The cache goes to a model by the name that its forward has, old or new, and no warning about names is printed."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf.learning.forward import response_logprobs
from rlhf.learning.pass_choice import random_batch
from rlhf.models.model_cache import cache_name, cache_of
from rlhf.models.recompute import enable
from rlhf.rollout.hf import HfEngine
from rlhf.rollout.sampling import Sampling

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}


class NewName(LlamaForCausalLM):
    """As transformers 5.40 will be: the old name is none of its own, so that **kwargs takes it."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None, **kwargs):
        kwargs.pop("past_key_values", None)
        told = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        return super().forward(input_ids, **told, cache=cache, **kwargs)


class OldName(LlamaForCausalLM):
    """As before 5.24: the new name is none, in what it takes and in what it gives."""

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs
    ):
        kwargs.pop("cache", None)
        told = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        output = super().forward(input_ids, **told, cache=past_key_values, **kwargs)
        return SimpleNamespace(logits=output.logits, past_key_values=output.cache)


def model_of(kind=LlamaForCausalLM):
    torch.manual_seed(0)
    return kind(LlamaConfig(**SHAPE)).eval()


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


@torch.no_grad()
def plain(model, prompt, ids) -> list[float]:
    """Log-probs of a pass over the whole row, with no cache at all."""
    logits = model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor([ids]).T)[:, 0].tolist()


@pytest.mark.parametrize("kind", [LlamaForCausalLM, NewName, OldName])
@pytest.mark.parametrize("prompts", [[[3, 4, 5], [8]], [[3, 4], [8, 9]]], ids=["mixed lengths", "equal lengths"])
def test_the_engine_finds_the_cache_by_either_name(kind, prompts):
    model = model_of(kind)
    samples = HfEngine(model).generate(
        prompts, [0, 1], Sampling(n=2, max_tokens=6, temperature=1.0, stop_ids=()), lambda: 0
    )
    for index, sample in enumerate(samples):
        assert list(sample.logprobs) == pytest.approx(plain(model, prompts[index // 2], list(sample.ids)), abs=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, NewName, OldName])
def test_the_learner_finds_the_cache_by_either_name(kind, checkpointing):
    model = model_of(kind)
    batch = random_batch(model, [5, 2], [0, 0, 1], [4, 1, 6])
    ours_BT = response_logprobs(enable(model) if checkpointing else model, batch, 1.0)
    for row, length in enumerate(batch.lengths()):
        theirs = plain(model, batch.prompts[batch.prompt_of_B[row]], batch.ids_BT[row, :length].tolist())
        assert ours_BT[row, :length].tolist() == pytest.approx(theirs, abs=1e-5)
    assert ours_BT.requires_grad and ours_BT.sum().backward() is None


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_recurrent_model_is_given_its_state_by_the_name_it_has(family):
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 4,
        "num_heads": 4,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, n_groups=1, chunk_size=8)).eval()
    sampling = Sampling(n=2, max_tokens=5, temperature=1.0, stop_ids=())
    samples = HfEngine(model).generate([[3, 4, 5], [8, 2, 7]], [0, 1], sampling, lambda: 0)
    for index, sample in enumerate(samples):
        prompt = [[3, 4, 5], [8, 2, 7]][index // 2]
        assert list(sample.logprobs) == pytest.approx(plain(model, prompt, list(sample.ids)), abs=1e-4)


def test_a_model_that_takes_no_cache_is_refused_before_it_computes():
    class NoName(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            raise AssertionError("nothing is computed")

    model = model_of(NoName)
    with pytest.raises(ValueError, match="NoName takes no cache: none of cache, past_key_values, cache_params"):
        HfEngine(model).generate([[3]], [0], Sampling(n=1, max_tokens=2, temperature=1.0, stop_ids=()), lambda: 0)
    with pytest.raises(ValueError, match="NoName takes no cache"):
        response_logprobs(model, random_batch(model, [2], [0], [2]), 1.0)
    with pytest.raises(ValueError, match="has no cache"):
        cache_of(SimpleNamespace(logits=None))
    assert cache_name(model_of(OldName)) == "past_key_values"


@pytest.mark.slow
def test_the_first_screen_and_the_workers_log_warn_of_nothing(rlhf_train, tmp_path):
    options = ["steps=1", "prompts_per_step=2", "task.held_out=4", "logger=jsonl", "experiment=smoke", "sft.steps=1"]
    done = rlhf_train(*options, "hydra.run.dir=first")
    again = rlhf_train(*options, "model=hf", "model.path=first/policy", "hydra.run.dir=second")
    logs = [path.read_text() for path in tmp_path.glob("*/worker-*.log")]
    for text in (done.stdout, done.stderr, again.stdout, again.stderr, *logs):
        assert "Warning" not in text and "deprecated" not in text, text
    assert done.returncode == again.returncode == 0 and len(logs) == 2
