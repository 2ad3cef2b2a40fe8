"""`rollout.batch_invariant`: a row has the same bits whatever is sampled beside it, and where."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.rollout.decoder import Filled, make_invariant_decoder
from rlhf.rollout.hf import HfEngine
from rlhf.rollout.invariant import BLOCK, blocked, filled, grouped_mm, in_blocks, padded_width, prepared
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.spec_of_run import is_invariant
from rlhf.rollout.vllm import environment
from tests.benchmarks.tiny_families import tiny

MIXED = [[3, 4, 5, 6, 7], [8], [9, 2, 10], [4, 4], [11, 3, 5, 2, 6], [5, 9] * 9]
SAMPLING = Sampling(n=3, max_tokens=9, temperature=0.8, stop_ids=tuple(range(0, 96, 9)))
FAMILIES = ["llama", "gpt2", "mistral", "bloom", "qwen3_moe", "gpt_oss", "mamba", "lfm2", "qwen3_next", "falcon_h1"]


def bits(sample):
    return sample.ids.tobytes(), sample.logprobs.tobytes()


def asked(engine, prompts, seeds, sampling):
    """The rows of each prompt, by the prompt's seed, as bits."""
    samples = engine.generate(prompts, seeds, sampling, lambda: 0)
    return {seed: [bits(each) for each in samples[sampling.n * i :][: sampling.n]] for i, seed in enumerate(seeds)}


def scattered(engine, prompts, seeds, sampling, choose):
    """As `asked`, in other batches and another order, and with other numbers of samples a prompt."""
    found, order = {}, list(range(len(prompts)))
    choose.shuffle(order)
    while order:
        cut = choose.randint(1, len(order))
        part, order = order[:cut], order[cut:]
        some = replace(sampling, n=choose.randint(1, sampling.n + 2))
        found |= asked(engine, [prompts[i] for i in part], [seeds[i] for i in part], some)
    return found


def check_invariant(engine, choose):
    count, longest = choose.choice([1, 2, 5, 12, 40]), choose.choice([2, 9, 50])
    prompts = [[choose.randrange(2, 12) for _ in range(choose.randint(1, longest))] for _ in range(count)]
    sampling = Sampling(choose.choice([1, 3, 10]), choose.choice([1, 8]), choose.choice([0.0, 0.7, 1.0]), (1, 5))
    whole = asked(engine, prompts, range(count), sampling)
    for seed, rows in scattered(engine, prompts, range(count), sampling, choose).items():
        assert rows[: sampling.n] == whole[seed][: len(rows)]


# --- whole engines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_row_has_the_same_bits_in_any_batch_any_order_and_any_request(model, dtype):
    engine = HfEngine(copy.deepcopy(model).to(dtype), invariant=True)

    @settings(max_examples=15)
    @given(st.randoms(use_true_random=False))
    def holds(choose):
        check_invariant(engine, choose)

    holds()


def test_without_it_the_bits_depend_on_the_batch(model):
    engine = HfEngine(model)
    whole = asked(engine, MIXED[:5], range(5), replace(SAMPLING, stop_ids=()))
    apart = [asked(engine, [prompt], [i], replace(SAMPLING, stop_ids=())) for i, prompt in enumerate(MIXED[:5])]
    assert any(whole[i] != alone[i] for i, alone in enumerate(apart))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_every_kind_of_layer_have_the_same_bits_in_any_batch(family):
    for dtype in (torch.float32, torch.bfloat16):
        engine = HfEngine(tiny(family).to(dtype), invariant=True)
        for seed in range(3):
            check_invariant(engine, random.Random(seed))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "mamba", "dory"])
def test_its_log_probs_are_those_of_the_plain_forward(family):
    model = tiny(family)
    samples = HfEngine(model, invariant=True).generate(MIXED, range(len(MIXED)), SAMPLING, lambda: 0)
    assert len({len(sample.ids) for sample in samples}) > 1, "rows leave the batch at different times"
    for index, sample in enumerate(samples):
        prompt, ids = MIXED[index // SAMPLING.n], list(sample.ids)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = (logits / SAMPLING.temperature).log_softmax(-1).gather(-1, torch.tensor([ids]).T)[:, 0]
        assert list(sample.logprobs) == pytest.approx(expected.tolist(), abs=1e-4)


def test_rows_whose_cache_is_computed_anew_have_the_same_bits_alone(model):
    def sampled(prompts, seeds):
        turns = iter([0, 0, 1, *[1] * 20])
        engine = HfEngine(model, recomputes=True, invariant=True)
        return [bits(each) for each in engine.generate(prompts, seeds, SAMPLING, lambda: next(turns))]

    together = sampled(MIXED, range(len(MIXED)))
    assert together == [row for i, prompt in enumerate(MIXED) for row in sampled([prompt], [i])]


def test_prompts_of_one_bucket_share_a_batch_and_those_without_room_for_padding_have_their_own(model):
    limited = copy.deepcopy(model)
    limited.config.max_position_embeddings = 25
    with torch.inference_mode():
        decoder = make_invariant_decoder(limited, [[3] * n for n in (1, 7, 8, 16, 15, 17)], SAMPLING)
    parts = {tuple(places // SAMPLING.n): part for places, part in decoder._parts}
    assert sorted({tuple(dict.fromkeys(key)) for key in parts}) == [(0, 1), (2, 4), (3,), (5,)]
    assert all(isinstance(part, Filled) and not len(part._decoder.logits) % BLOCK for part in parts.values())


# --- its parts --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.none() | st.integers(1, 5000))
def test_a_width_follows_from_the_length_and_has_room_for_it(length, most):
    width = padded_width(length, most)
    assert width >= length and (most is None or width <= max(most, length))
    assert width > length or most is not None
    assert padded_width(length, None) <= 2 * length + 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("inner", "outer"), [(16, 12), (64, 64), (96, 29), (384, 128)])
def test_a_product_of_blocks_is_right_and_has_the_same_bits_for_a_row_wherever_it_is(dtype, inner, outer):
    torch.manual_seed(0)
    rows, weight = torch.randn(70, inner).to(dtype), torch.randn(inner, outer).to(dtype)
    product = in_blocks(rows, weight)
    assert torch.allclose(
        product.float(), rows.float() @ weight.float(), atol=1e-4 if inner and dtype.itemsize == 4 else 1
    )
    for count in (1, 2, 31, 32, 33, 70):
        chosen = torch.randperm(70)[:count]
        assert torch.equal(in_blocks(rows[chosen], weight), product[chosen])
        assert torch.equal(in_blocks(rows[70 - count :], weight), product[70 - count :]), "from the middle of a tensor"
    assert in_blocks(rows[:0], weight).shape == (0, outer)


def test_products_with_a_matrix_a_group_are_those_of_each_group():
    torch.manual_seed(0)
    rows, weight = torch.randn(50, 16), torch.randn(4, 16, 8)
    ends = torch.tensor([3, 3, 40, 50], dtype=torch.int32)
    expected = torch.cat([rows[:3] @ weight[0], rows[3:40] @ weight[2], rows[40:] @ weight[3]])
    assert torch.allclose(grouped_mm(rows, weight, ends), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"rollout\.batch_invariant=true"):
        grouped_mm(rows, weight, ends, bias=torch.zeros(4, 8))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_prepared_model_computes_as_ever_outside_and_its_copy_with_weights_of_its_own(family):
    model, ids = tiny(family), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(ids).logits
        prepared(model)
        assert torch.equal(model(ids).logits, before)
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.zero_()
        with blocked():
            assert not other(ids).logits.any() and model(ids).logits.any()
    model(ids).logits.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lm_head" in name)


def test_places_are_filled_up_with_the_first():
    assert filled(np.array([4, 2, 7]), 4).tolist() == [4, 2, 7, 4]
    assert filled(np.array([4, 2]), 2).tolist() == [4, 2]


def test_linear_layers_are_as_torch_has_them():
    layer = torch.nn.Linear(16, 8)
    holder = tiny("llama")
    holder.extra = layer
    prepared(holder)
    x = torch.randn(2, 5, 16)
    with blocked():
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)


# --- when it is on ----------------------------------------------------------------------------------------------------


def test_null_is_on_where_a_run_is_exact_only_with_it(compose_run):
    ahead = ("rollout.ahead.lag=1", "algo.correction=tis")
    assert not is_invariant(compose_run("experiment=smoke"), "cpu")
    assert not is_invariant(compose_run("experiment=smoke", "algo.correction=tis"), "cpu")
    exact = compose_run("experiment=smoke", *ahead)
    assert is_invariant(exact, "cpu") and not is_invariant(exact, "cuda")
    assert not is_invariant(compose_run("experiment=smoke", *ahead, "rollout.ahead.order=free"), "cpu")
    assert not is_invariant(compose_run("experiment=smoke", *ahead, "threads=2"), "cpu")
    assert not is_invariant(compose_run("experiment=smoke", *ahead, "rollout=vllm"), "cpu")
    assert not is_invariant(compose_run("experiment=smoke", *ahead, "rollout.batch_invariant=false"), "cpu")
    assert is_invariant(compose_run("experiment=smoke", "rollout.batch_invariant=true"), "cuda")


def test_vllm_is_told_by_its_own_variable():
    spec = WorkerSpec(architecture={"model_type": "qwen3"}, endpoint={}, engine="vllm", batch_invariant=True)
    assert environment(spec)["VLLM_BATCH_INVARIANT"] == "1"
    assert "VLLM_BATCH_INVARIANT" not in environment(replace(spec, batch_invariant=False))
