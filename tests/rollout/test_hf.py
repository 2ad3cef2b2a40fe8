import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.rollout.hf import HfEngine, draw
from rlhf.rollout.sampling import Sampling

EOS = 1
MIXED = [[3, 4, 5, 6, 7], [8], [9, 2, 10], [4, 4], [11, 3, 5, 2, 6]]
EQUAL = [[3, 4, 5], [8, 2, 2], [9, 2, 10]]
VOCABULARY = 12
SAMPLING = Sampling(n=3, max_tokens=10, temperature=0.6, stop_ids=(EOS,))


def TURN():
    """The weights stay at version 0."""
    return 0


def recomputed(model, prompt, sample, temperature):
    """Log-probs by feeding every prefix alone, without cache, padding or batch."""
    logprobs = []
    for position, token in enumerate(sample.ids):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *sample.ids[:position]]])).logits[0, -1].float()
        logprobs.append((logits / (temperature or 1.0)).log_softmax(-1)[token].item())
    return logprobs


@pytest.mark.parametrize("prompts", [MIXED, EQUAL], ids=["mixed lengths", "equal lengths"])
@pytest.mark.parametrize("temperature", [0.6, 0.0])
def test_logprobs_are_those_of_a_recomputation_token_by_token(model, prompts, temperature):
    sampling = replace(SAMPLING, temperature=temperature)
    samples = HfEngine(model).generate(prompts, range(len(prompts)), sampling, TURN)
    assert len({len(sample.ids) for sample in samples}) > 1, "rows must end at different lengths to test the dropping"
    for index, sample in enumerate(samples):
        assert list(sample.logprobs) == pytest.approx(
            recomputed(model, prompts[index // 3], sample, temperature), abs=1e-5
        )


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bloom", "sliding"])
def test_any_causal_lm_samples_with_the_right_logprobs(architecture):
    model = ARCHITECTURES[architecture]()
    samples = HfEngine(model).generate(MIXED, range(len(MIXED)), SAMPLING, TURN)
    for index, sample in enumerate(samples):
        assert list(sample.logprobs) == pytest.approx(recomputed(model, MIXED[index // 3], sample, 0.6), abs=1e-5)


def _made(name, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=12, **settings)).eval()


LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
}
ARCHITECTURES = {
    "gpt2": lambda: _made("gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.5),
    "llama": lambda: _made("llama", **LLAMA),
    "bloom": lambda: _made("bloom", hidden_size=16, n_layer=1, n_head=2, initializer_range=0.5),
    "sliding": lambda: _made("mistral", sliding_window=4, **LLAMA),
    "dynamic_rope": lambda: _made(
        "llama",
        max_position_embeddings=8,  # less than what is sampled, so that the module's buffers change on the way
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        **LLAMA,
    ),
}


def test_a_sample_is_the_same_alone_in_a_batch_and_in_another_order(model):
    engine = HfEngine(model)
    together = engine.generate(MIXED, [10, 11, 12, 13, 14], SAMPLING, TURN)
    alone = [sample for i, prompt in enumerate(MIXED) for sample in engine.generate([prompt], [10 + i], SAMPLING, TURN)]
    backwards = engine.generate(MIXED[::-1], [14, 13, 12, 11, 10], SAMPLING, TURN)
    assert [s.ids for s in together] == [s.ids for s in alone]
    assert [s.ids for s in together[:3]] == [s.ids for s in backwards[-3:]]
    assert len({tuple(s.ids) for s in together}) > 5


@pytest.mark.parametrize("prompts", [MIXED, EQUAL], ids=["mixed lengths", "equal lengths"])
def test_after_new_weights_log_probs_are_theirs_where_the_cache_is_computed_anew(model, prompts):
    plain, changed = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def off_by(recomputes):
        turns = iter([0, 0, 0, 1, 1, 1, 1, 1, 1, 1])

        def turn():
            version = next(turns)
            model.load_state_dict(changed.state_dict() if version else plain)
            return version

        samples = HfEngine(model, recomputes).generate(prompts, range(len(prompts)), SAMPLING, turn)
        model.load_state_dict(plain)
        off = [0.0, 0.0]
        for row, sample in enumerate(samples):
            for version, weights in enumerate((model, changed)):
                expected = recomputed(weights, prompts[row // SAMPLING.n], sample, SAMPLING.temperature)
                of = [place for place, own in enumerate(sample.versions) if own == version]
                off[version] = max([off[version], *(abs(sample.logprobs[place] - expected[place]) for place in of)])
        assert {version for sample in samples for version in sample.versions} == {0, 1}
        return off

    anew, kept = off_by(True), off_by(False)
    assert max(anew) < 1e-5 and kept[0] < 1e-5 < 1e-3 < kept[1]


def test_a_row_ends_with_its_eos_or_at_the_limit_without_one(model):
    samples = HfEngine(model).generate(MIXED * 4, range(20), SAMPLING, TURN)
    reasons = {sample.finish_reason for sample in samples}
    assert reasons == {"stop", "length"}
    for sample in samples:
        assert EOS not in sample.ids[:-1]
        assert (sample.finish_reason == "stop") == (sample.ids[-1] == EOS)
        assert sample.finish_reason == "stop" or len(sample.ids) == 10


def test_without_stop_ids_every_row_runs_to_the_limit(model):
    samples = HfEngine(model).generate(MIXED, range(5), replace(SAMPLING, stop_ids=()), TURN)
    assert {(len(sample.ids), sample.finish_reason) for sample in samples} == {(10, "length")}


def test_stopping_cuts_unfinished_rows_and_leaves_finished_ones(model):
    whole = HfEngine(model).generate(MIXED, range(5), SAMPLING, TURN)
    turns = iter([4, 4, None])
    cut = HfEngine(model).generate(MIXED, range(5), SAMPLING, lambda: next(turns))
    assert {sample.finish_reason for sample in cut} == {"abort", "stop"}
    assert [sample.ids for sample in cut] == [sample.ids[:2] for sample in whole]
    none = HfEngine(model).generate(MIXED, range(5), SAMPLING, lambda: None)
    assert {(len(sample.ids), sample.finish_reason) for sample in none} == {(0, "abort")}


def test_every_token_has_the_version_of_the_weights_that_sampled_it(model):
    changing = copy.deepcopy(model)
    whole = [s.ids for s in HfEngine(changing).generate(MIXED, range(5), replace(SAMPLING, stop_ids=()), TURN)]
    turns = iter([7, 7, 8, 8, 8, 8, 8, 8, 8, 8])

    def turn():
        version = next(turns)
        if version == 8:
            changing.lm_head.weight.data.fill_(0.0)  # from here on all tokens are equally likely
        return version

    samples = HfEngine(changing).generate(MIXED, range(5), replace(SAMPLING, stop_ids=()), turn)
    assert {tuple(sample.versions) for sample in samples} == {(7, 7, *[8] * 8)}
    assert [sample.ids[:2] for sample in samples] == [ids[:2] for ids in whole]
    for sample in samples:
        assert sample.logprobs[2:] == pytest.approx([-np.log(VOCABULARY)] * 8, abs=1e-5)


def test_samples_follow_the_models_distribution(model):
    prompt = [3, 4, 5]
    samples = HfEngine(model).generate([prompt], [5], Sampling(20000, 1, 1.3, ()), TURN)
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(-1).numpy() * 20000
    counts = np.bincount([sample.ids[0] for sample in samples], minlength=12)
    assert ((counts - expected) ** 2 / expected).sum() < 37.4  # chi-squared, 11 degrees of freedom: p = 0.0001


@pytest.mark.parametrize("vocabulary", [5, 40000], ids=["float64 sums", "float32 sums"])
def test_a_token_of_probability_zero_is_never_drawn(vocabulary):
    logits = torch.full((4, vocabulary), -torch.inf)
    logits[:, 1] = 0.0
    logits[:, 3] = -0.5
    ids, logprobs = draw(logits, np.array([0.0, 0.3, 0.99, np.nextafter(1.0, 0.0)]), 1.0)
    assert ids.tolist() == [1, 1, 3, 3]
    assert torch.isfinite(logprobs).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_with_broken_weights_is_an_error_not_a_sample(temperature):
    model = ARCHITECTURES["llama"]()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        HfEngine(model).generate(MIXED, range(5), replace(SAMPLING, temperature=temperature), TURN)


def test_a_learners_model_and_a_workers_sample_the_same_bits(model):
    prompts = [[3, 4, 5 + i % 4] for i in range(16)]
    frozen = copy.deepcopy(model).requires_grad_(False)
    sampling = replace(SAMPLING, n=8)
    learning = HfEngine(copy.deepcopy(model).requires_grad_(True)).generate(prompts, range(16), sampling, TURN)
    assert learning == HfEngine(frozen).generate(prompts, range(16), sampling, TURN)


def test_dropout_is_off_while_sampling_and_back_afterwards():
    model = ARCHITECTURES["gpt2"]().train()
    model.transformer.wte.eval()
    engine = HfEngine(model)
    first = engine.generate(MIXED, range(5), SAMPLING, TURN)
    assert first == engine.generate(MIXED, range(5), SAMPLING, TURN)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [module.training for module in model.modules()].count(False) == 1


def test_a_learner_can_train_the_model_after_sampling_from_it():
    model = ARCHITECTURES["dynamic_rope"]().train()
    HfEngine(model).generate(MIXED, range(5), SAMPLING, TURN)
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_samples_have_the_numbers_that_they_have_in_their_group(model):
    sampling = Sampling(n=6, max_tokens=5, temperature=1.0, stop_ids=(1,))
    together = HfEngine(model).generate([[3, 4], [5]], [7, 8], sampling, lambda: 0)
    for first in (0, 2, 4):
        share = replace(sampling, n=2, firsts=(first, first))
        part = HfEngine(model).generate([[3, 4], [5]], [7, 8], share, lambda: 0)
        expected = [*together[first : first + 2], *together[6 + first : 8 + first]]
        assert [sample.ids for sample in part] == [sample.ids for sample in expected]
