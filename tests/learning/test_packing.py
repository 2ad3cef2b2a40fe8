"""Packed rows: log-probs, entropies and gradients of padded ones, for every architecture, algorithm and split."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config.algo import Aggregation
from rlhf.learning import packed_attention, padded_attention, pass_choice
from rlhf.learning.fitting import LADDER, fitting
from rlhf.learning.learner import Learner
from rlhf.learning.microbatches import Sizes, fill
from rlhf.learning.packing import FULL, STEP, packed, shares
from rlhf.learning.pass_choice import choose_passes, random_batch, trial
from rlhf.learning.passes import PADDED, Packed
from tests.learning.test_learner import ALGOS, conversations, gradients, make_learner, sampled

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "cohere": {},  # scales its logits
    "cohere2": {"sliding_window": 7},
    "gemma3_text": {"sliding_window": 7},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128},  # learned positions
    "gpt_neox": {},
    "granite": {"logits_scaling": 2.0},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {},
    "qwen2": {},  # biases
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
__all__ = ["make_learner"]  # a fixture


def model_of(name: str, **options):
    """A small model of an architecture, whose log-probs are far apart."""
    config = AutoConfig.for_model(name.partition("-")[0], **(SHAPE | ARCHITECTURES.get(name, {}) | options))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model


def results(model, batch, way) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, entropies, and the gradient of a random sum of both, by parameter."""
    model.zero_grad(set_to_none=True)
    logprobs, entropy = way.logprobs_and_entropy(model, batch, 0.7, entropy_gradient=True)
    weights = torch.rand(logprobs.shape, generator=torch.Generator().manual_seed(1)) * batch.mask_BT
    ((logprobs * weights).sum() + 0.3 * (entropy * weights).sum()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logprobs.detach() * batch.mask_BT, entropy.detach() * batch.mask_BT, grads


def assert_same(ours, theirs) -> None:
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert ours[2].keys() == theirs[2].keys() and ours[2]
    rounding = 1e-7 * max(
        float(gradient.norm()) for gradient in theirs[2].values()
    )  # biases of keys have none but this
    for name, gradient in theirs[2].items():
        assert float((ours[2][name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + rounding, name


def some_rows(model):
    lengths = [3, 1, 23, 8, 14, 2, 19, 1, 7, 11, 22, 5]
    return random_batch(model, [17, 5, 11], [b // 4 for b in range(12)], lengths)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_entropies_and_gradients_are_those_of_padded_rows(name):
    model = model_of(name)
    window = packed_attention.window_of(model)
    assert (window is not None) == ("sliding_window" in ARCHITECTURES[name])
    assert_same(results(model, some_rows(model), Packed(False, window)), results(model, some_rows(model), PADDED))


def test_a_prompt_that_is_shared_and_one_that_is_not_have_the_same_results():
    model, batch = model_of("llama"), some_rows(model_of("llama"))
    sizes = Sizes([len(p) for p in batch.prompts], batch.prompt_of_B, batch.lengths())
    assert shares(sizes, range(12), None) and not shares(sizes, range(12), 20)
    together, apart = packed(batch), packed(batch, window=20)
    assert len(together.ids_T) < len(apart.ids_T)
    assert_same(results(model, batch, Packed(False)), results(model, batch, Packed(False, 20)))


@pytest.mark.slow
def test_compiled_layers_have_the_same_results_for_any_number_of_tokens():
    model = model_of("gemma3_text")  # two kinds of layers
    window = packed_attention.window_of(model)
    for lengths in ([3, 20, 7, 9], [1, 5], [30, 30, 30, 30, 30, 30]):
        batch = random_batch(model, [9, 4], [b % 2 for b in range(len(lengths))], lengths)
        assert_same(results(model, batch, Packed(True, window)), results(model, batch, PADDED))


def as_packed(learner: Learner) -> Learner:
    learner.passes = Packed(False, packed_attention.window_of(learner.policy))
    return learner


REWARDS: list[float | None] = [float(b % 3) for b in range(12)]
AGGREGATIONS = [f"algo=grpo algo.aggregation={aggregation.value}" for aggregation in Aggregation]


@pytest.mark.parametrize(
    "algo", [*(f"algo={name}" for name in ALGOS), *AGGREGATIONS, "algo=grpo algo.entropy_coef=0.1"]
)
def test_gradients_of_every_algorithm_are_those_of_padded_rows_for_any_split(make_learner, algo):
    learner = make_learner(*algo.split())
    padded = gradients(learner, conversations(), list(REWARDS))
    as_packed(learner)
    for tokens in (1, 20, 10000) if algo in ("algo=grpo", "algo=ppo") else (20,):
        learner.config.tokens_per_microbatch = tokens
        ours = gradients(learner, conversations(), list(REWARDS))
        assert float((ours - padded).norm()) <= 1e-5 * float(padded.norm()), tokens


DIALS = {
    "adapter": ["model.lora.rank=2", "algo.kl_coef=0"],
    "checkpointing": ["model.gradient_checkpointing=true"],
    "several updates": ["updates_per_step=3", "optim.lr=1e-9"],
    "temperature": ["rollout.temperature=0.5"],
}


@pytest.mark.parametrize("dials", DIALS.values(), ids=DIALS)
def test_gradients_are_those_of_padded_rows_whatever_else_is_chosen(make_learner, dials):
    def grads(way) -> torch.Tensor:
        learner = way(make_learner(*dials))
        if "model.lora.rank=2" in dials:
            from rlhf.models.adapter import add_adapter

            add_adapter(learner.policy, 2, 16.0, [], seed=3)
            for name, parameter in learner.policy.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(4))
            learner.reference = None
        return gradients(learner, sampled(), list(REWARDS))

    padded, ours = grads(lambda learner: learner), grads(as_packed)
    assert float((ours - padded).norm()) <= 1e-5 * float(padded.norm()) and padded.abs().max() > 1e-4


def test_in_bfloat16_packed_rows_are_no_farther_from_fp32_than_padded_ones():
    exact = model_of("qwen2", hidden_size=64, num_hidden_layers=4)
    half = copy.deepcopy(exact).to(torch.bfloat16)
    exact = copy.deepcopy(half).float()
    batch = some_rows(exact)
    truth, padded, ours = (results(m, batch, w) for m, w in ((exact, PADDED), (half, PADDED), (half, Packed(False))))

    def error(found) -> tuple[float, float]:
        flat = torch.cat([found[2][name].float().flatten() - gradient.flatten() for name, gradient in truth[2].items()])
        return float((found[0] - truth[0]).norm()), float(flat.norm())

    assert error(ours)[0] <= 1.2 * error(padded)[0] and error(ours)[1] <= 1.2 * error(padded)[1]


def test_fp32_masters_get_the_gradients_of_packed_rows(make_learner):
    moved = {}
    for name, way in (("padded", lambda learner: learner), ("packed", as_packed)):
        learner = way(make_learner("model.dtype=bfloat16", "optim.lr=0.01", "algo.kl_coef=0"))
        before = [p.clone() for group in learner.optimizer.param_groups for p in group["params"]]
        learner.learn(learner.score(sampled()), list(REWARDS))
        after = [p for group in learner.optimizer.param_groups for p in group["params"]]
        moved[name] = torch.cat([(a - b).detach().flatten() for a, b in zip(after, before, strict=True)])
    assert moved["packed"].dtype == torch.float32 and moved["packed"].abs().max() > 1e-3
    assert torch.nn.functional.cosine_similarity(moved["packed"], moved["padded"], dim=0) > 0.9


def test_old_and_new_log_probs_of_one_pass_have_the_ratio_one_exactly(make_learner):
    learned = as_packed(make_learner("algo.kl_coef=0"))
    numbers = learned.learn(learned.score(sampled()), list(REWARDS))
    assert numbers["approx_kl"] == 0.0 and numbers["clip_fraction"] == 0.0


def test_no_tensor_of_the_whole_vocabulary_for_all_tokens_is_put_together(monkeypatch):
    from rlhf.learning import output_layer
    from tests.learning.test_learner import Distributions

    monkeypatch.setitem(output_layer.CHUNK, "cpu", 10 * SHAPE["vocab_size"])
    model = model_of("qwen2")
    with Distributions(SHAPE["vocab_size"]) as made:
        results(model, some_rows(model), Packed(False))
    assert made.most == 10 < sum(some_rows(model).lengths())


# --- the sequence -----------------------------------------------------------------------------------------------------

GROUPS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(0, 7), min_size=1, max_size=4)), min_size=1, max_size=5
)


def batch_of(groups):
    """Distinct token ids, so that each place can be told."""
    model = SimpleNamespace(
        parameters=lambda: iter([torch.zeros(1)]),
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=2**30)),
    )
    prompts = [length for length, _ in groups]
    owners = [p for p, (_, rows) in enumerate(groups) for _ in rows]
    lengths = [length for _, rows in groups for length in rows]
    batch = random_batch(model, prompts, owners, [max(1, length) for length in lengths])
    for row, length in enumerate(lengths):
        batch.mask_BT[row, length:] = 0
    return batch


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.booleans())
def test_every_response_token_is_predicted_where_its_context_ends(groups, share):
    batch = batch_of(groups)
    tokens = packed(batch, None if share else 0)
    bounds, shared = tokens.segments.bounds.tolist(), int(tokens.segments.sizes[0])
    assert len(tokens.ids_T) % STEP == 0 and bounds[-1] == len(tokens.ids_T) and len(tokens.predicting_N) % STEP == 0
    places, width = tokens.places_n.tolist(), batch.ids_BT.shape[1]
    assert sorted(places) == [r * width + t for r, length in enumerate(batch.lengths()) for t in range(length)]
    prompts = {}
    for p, prompt in enumerate(batch.prompts):
        prompts[prompt[-1]] = p
    for n, place in enumerate(places):
        row, t = divmod(place, width)
        prompt, at = batch.prompts[batch.prompt_of_B[row]], int(tokens.predicting_N[n])
        before = [*prompt, *batch.ids_BT[row, :t].tolist()]
        assert int(tokens.targets_N[n]) == int(batch.ids_BT[row, t])
        assert int(tokens.ids_T[at]) == before[-1] and int(tokens.positions_T[at]) == len(before) - 1
        begin = max(b for b in bounds if b <= at)
        own = tokens.ids_T[begin : at + 1].tolist()
        assert before[len(before) - len(own) :] == own and (len(own) == len(before) or (shared and begin >= shared))


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.integers(1, 60), st.booleans())
def test_micro_batches_have_every_row_once_and_keep_a_prompts_rows_together_where_they_fit(groups, budget, shared):
    owners = [p for p, (_, rows) in enumerate(groups) for _ in rows]
    sizes = Sizes([length for length, _ in groups], owners, [length for _, rows in groups for length in rows])

    def tokens(part) -> int:
        prompts = [owners[row] for row in part]
        inner = sum(max(0, sizes.responses_B[row] - 1) for row in part)
        return inner + sum(sizes.prompts[p] for p in (set(prompts) if shared else prompts))

    parts = fill(sizes, range(len(owners)), budget, shared)
    assert sorted(row for part in parts for row in part) == list(range(len(owners)))
    assert all(tokens(part) <= budget or len(part) == 1 for part in parts)
    for prompt in range(len(groups)):
        rows = [row for row, owner in enumerate(owners) if owner == prompt]
        if tokens(rows) <= budget:
            assert any(set(rows) <= set(part) for part in parts)


def test_what_fits_is_told_by_a_line_through_two_measurements():
    assert fitting(10e9, (4096, int(2e9)), (8192, int(3e9))) == 32768
    assert fitting(3.5e9, (4096, int(2e9)), (8192, int(3e9))) == 8192
    assert fitting(1e9, (4096, int(2e9)), (8192, int(3e9))) == LADDER[0]


def test_trying_what_fits_changes_no_weight_and_leaves_no_gradient(make_learner):
    learner = as_packed(make_learner("algo=ppo"))
    before = copy.deepcopy(learner.weights())
    learner.drop_gradients(random_batch(learner.policy, [4], [0, 0], [5, 3]))
    assert all(torch.equal(before[name], value) for name, value in learner.weights().items())
    assert all(parameter.grad is None for parameter in learner.policy.parameters())
    with pytest.raises(RuntimeError, match="no memory"):
        learner.passes.values = lambda *_: (_ for _ in ()).throw(RuntimeError("no memory"))
        learner.drop_gradients(random_batch(learner.policy, [4], [0, 0], [5, 3]))
    assert all(parameter.grad is None for parameter in learner.policy.parameters())


# --- the choice -------------------------------------------------------------------------------------------------------


def chosen(model, **dials):
    from rlhf.config import HfModelConfig

    said: list[str] = []
    return choose_passes(model, HfModelConfig(path="x", **dials), said.append), said


def test_by_default_rows_are_padded_on_a_cpu_and_packed_only_if_asked_for():
    model = model_of("llama")
    assert chosen(model) == (PADDED, [])
    way, said = chosen(model, attention="packed")
    assert isinstance(way, Packed) and not way.compiled and not said


def test_compiling_what_is_padded_is_refused():
    with pytest.raises(ValueError, match=r"model\.compile=true compiles packed rows: set model\.attention=packed"):
        chosen(model_of("llama"), compile=True)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("gemma2", {"query_pre_attn_scalar": 8}, "its attention has softcap"),
        ("qwen3_next", {"num_experts": 4, "num_experts_per_tok": 2}, "layers of linear_attention"),
    ],
)
def test_a_model_whose_attention_cannot_be_packed_is_told_in_one_line(name, options, reason):
    with pytest.raises(ValueError, match=rf"model\.attention=packed: .*{reason}.*: set model\.attention=auto or sdpa"):
        chosen(model_of(name, **options), attention="packed")


def test_a_model_that_mixes_rows_is_found_out_before_it_trains(monkeypatch):
    model = model_of("llama")
    assert trial(model, Packed(False)) is None

    def blind(q, k, v, segments, scale, window):
        whole = torch.tensor([0, len(q)], dtype=torch.int32)
        nobody = torch.zeros(1, dtype=torch.int32)
        said = [whole, nobody, nobody, torch.tensor([0, len(q), 0, 0])]
        return attend(q, k, v, said, scale, window)

    attend = packed_attention.packed_attention
    monkeypatch.setattr(packed_attention, "packed_attention", blind)
    fault = trial(model, Packed(False))
    assert fault is not None and "other log-probs than padded ones" in fault


def test_what_a_model_raises_is_the_reason_that_it_is_not_packed():
    model = model_of("llama")
    model.model.forward = lambda **_: (_ for _ in ()).throw(RuntimeError("no\nsuch kernel"))
    assert trial(model, Packed(False)) == "RuntimeError: no such kernel"


def test_a_model_whose_backward_pass_fails_is_not_trained_that_way(monkeypatch):
    def no_gradient(*_):
        raise RuntimeError("no gradient here")

    monkeypatch.setattr(padded_attention, "backward", no_gradient)
    assert trial(model_of("llama"), Packed(False)) == "RuntimeError: no gradient here"


MASKED = {
    "phimoe": {"sliding_window": 48, "num_local_experts": 4},
    "qwen2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "sliding_window": 48},
        **{"shared_expert_intermediate_size": 16, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
    },
}


@pytest.mark.parametrize("name", MASKED)
def test_a_window_that_only_a_mask_tells_of_is_not_lost(name):
    model = model_of(name, **MASKED[name])
    assert packed_attention.window_of(model) == 48
    fault = trial(model, Packed(False, 48))
    assert fault is not None and "tells it by a mask alone" in fault


def test_few_positions_are_enough_for_a_trial():
    assert trial(model_of("gpt2", n_positions=24), Packed(False)) is None


def test_auto_says_why_layers_are_not_compiled_and_why_rows_are_not_packed(monkeypatch):
    monkeypatch.setattr(pass_choice, "trial", lambda policy, way, padded: "no compiler" if way.compiled else None)
    monkeypatch.setattr(pass_choice, "_compiles", lambda policy, config: True)
    way, said = chosen(model_of("llama"), attention="packed")
    assert isinstance(way, Packed) and not way.compiled
    assert said == ["learner: decoder layers are not compiled: no compiler"]
    monkeypatch.setattr(pass_choice, "_wanted", lambda policy, config: True)
    monkeypatch.setattr(pass_choice, "trial", lambda policy, way, padded: "it mixes rows")
    assert chosen(model_of("llama")) == (PADDED, ["learner: rows are padded, not packed: it mixes rows"])
    said = chosen(model_of("llama", head_dim=12))[1]
    assert len(said) == 1 and "heads of 8 to 256 numbers, in steps of 8, and these have 12" in said[0]


# --- attention and output layer ---------------------------------------------------------------------------------------


def attention_case(seed: int, shared: bool, heads: tuple[int, int] = (4, 2), size: int = 8):
    from rlhf.learning.packing import segments_of

    draw = random.Random(seed)
    prompts = [draw.randint(1, 9) for _ in range(3)]
    rows = [[draw.randint(1, 12) for _ in range(draw.randint(1, 3))] for _ in prompts]
    lengths = (
        [*prompts, *(n for of in rows for n in of)]
        if shared
        else [p + r for p, of in zip(prompts, rows, strict=True) for r in of]
    )
    groups = [sum(of) for of in rows]
    segments = segments_of(lengths, prompts if shared else [], groups if shared else [], torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(sum(lengths), n, size, generator=generator) for n in (heads[0], heads[1], heads[1], heads[0])
    ]
    owner = [(0, p, -1) for p, n in enumerate(prompts) for _ in range(n)] if shared else []
    if shared:
        numbered = ((p, r, n) for p, of in enumerate(rows) for r, n in enumerate(of))
        owner += [(1, p, r) for p, r, n in numbered for _ in range(n)]
    else:
        owner = [(1, s, 0) for s, n in enumerate(lengths) for _ in range(n)]
    return segments, tensors, owner


def dense(q, k, v, owner, window: int) -> torch.Tensor:
    """Attention by one mask of all tokens."""
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
    sees = torch.tensor(
        [[b <= a and (mine == other or (other[0] == 0 and mine[1] == other[1])) for b, other in enumerate(owner)]
         for a, mine in enumerate(owner)]
    )  # fmt: skip
    if window != FULL:
        places = torch.arange(len(owner))
        sees &= places[:, None] - places < window
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.3
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("shared", "window"), [(True, FULL), (False, FULL), (False, 3)])
def test_attention_and_its_gradients_equal_one_mask_over_all_tokens(seed, shared, window, monkeypatch):
    if seed % 2:
        monkeypatch.setattr(padded_attention, "FEW", 1)
        monkeypatch.setattr(padded_attention, "MANY", 400)
        padded_attention._planned.cache_clear()
    segments, (q, k, v, gradient), owner = attention_case(seed, shared)
    who = [segments.bounds, segments.prompts, segments.groups, segments.sizes]
    found = []
    for attend in (
        lambda q, k, v: packed_attention.packed_attention(q, k, v, who, 0.3, window)[0],
        lambda q, k, v: dense(q, k, v, owner, window),
    ):
        inputs = [each.clone().requires_grad_() for each in (q, k, v)]
        out = attend(*inputs)
        out.backward(gradient)
        found.append([out.detach(), *(each.grad for each in inputs)])
    padded_attention._planned.cache_clear()
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize(
    ("scale", "cap", "bias"), [(1.0, 0.0, False), (0.5, 0.0, True), (1.0, 2.0, False), (2.0, 3.0, True)]
)
def test_the_output_layers_log_probs_entropies_and_gradients_are_those_of_plain_logits(scale, cap, bias, monkeypatch):
    from rlhf.learning import output_layer

    monkeypatch.setitem(output_layer.CHUNK, "cpu", 100)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(17, 6, generator=generator), torch.randn(29, 6, generator=generator)
    offset = torch.randn(29, generator=generator) if bias else None
    ids, pull = torch.randint(0, 29, (17,), generator=generator), torch.randn(2, 17, generator=generator)

    def plain(hidden, weight, offset):
        logits = torch.nn.functional.linear(hidden, weight, offset)
        logits = (cap * (logits / cap).tanh() if cap else logits) * scale / 0.7
        log_p = logits.log_softmax(-1)
        return log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    def ours(hidden, weight, offset):
        layer = output_layer.OutputLayer(weight, offset, scale, cap)
        return output_layer.logprobs_and_entropy(hidden, layer, ids, 0.7, True, compiled=False)

    found = []
    for way in (plain, ours):
        inputs = [None if each is None else each.clone().requires_grad_() for each in (hidden, weight, offset)]
        outputs = way(*inputs)
        sum((one * two).sum() for one, two in zip(outputs, pull, strict=True)).backward()
        found.append([*(each.detach() for each in outputs), *(each.grad for each in inputs if each is not None)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_torch_compile_is_told_of_the_operator_is_what_it_does(dtype):
    segments, tensors, _ = attention_case(2, True)
    q, k, v, _ = (each.to(dtype).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for each in tensors)
    who = [segments.bounds, segments.prompts, segments.groups, segments.sizes]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(packed_attention.packed_attention, (q, k, v, who, 0.3, -1), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(("shared", "window"), [(True, FULL), (False, FULL), (False, 3)])
def test_flash_attention_equals_padded_segments_and_repeats_to_the_bit(size, shared, window):
    segments, tensors, _ = attention_case(1, shared, (14, 2), size)
    q, k, v, gradient = (each.cuda().bfloat16() for each in tensors)
    who = [segments.bounds.cuda(), segments.prompts.cuda(), segments.groups.cuda(), segments.sizes]

    def run(*inputs):
        inputs = [each.clone().requires_grad_() for each in inputs]
        out, _ = packed_attention.packed_attention(*inputs, who, 0.1, window)
        out.backward(gradient.to(out.dtype))
        return [out.detach(), *(each.grad for each in inputs)]

    half, again, exact = run(q, k, v), run(q, k, v), run(q.float(), k.float(), v.float())
    assert all(torch.equal(one, other) for one, other in zip(half, again, strict=True))
    for one, other in zip(half, exact, strict=True):
        assert float((one.float() - other).norm()) < 0.01 * float(other.norm())
