"""A checkpoint is trained only if every way in which the run computes it says what its plain forward says."""

import json

import pytest
import torch
from peft import PeftModel
from sizes import in_ci, in_full
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config import LoraConfig
from rlhf.learning.forward import response_values
from rlhf.learning.microbatches import Sizes
from rlhf.learning.pass_choice import random_batch
from rlhf.learning.passes import PADDED, WHOLE
from rlhf.models.adapter import add_adapter, base_weights, linear_layers, remove_adapter, save_adapter
from rlhf.models.merging import merged
from rlhf.models.recompute import enable
from rlhf.models.saving import save_model
from rlhf.models.value import Head, value_model
from rlhf.preflight.agreement import agreeing_passes, check_engine
from rlhf.rollout.build import architecture_of, build_model
from rlhf.rollout.decoder import Apart, Decoder, make_decoder
from rlhf.rollout.hf import HfEngine
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.spec import WorkerSpec
from tests.benchmarks.architectures import NOT_MADE, REFUSED, WRONG, judged
from tests.benchmarks.tiny_families import FAMILIES, tiny

MIXED, EQUAL = [[3, 4, 5, 6, 7], [8], [9, 20, 10]], [[3, 4, 5], [8, 7, 6], [9, 20, 10]]
SAMPLING = Sampling(n=2, max_tokens=7, temperature=1.0, stop_ids=tuple(range(0, 96, 5)))
HYBRID = ["qwen3_next", "lfm2", "bamba", "falcon_h1"]  # tests/benchmarks/architectures.py has all


@torch.no_grad()
def plain(model, prompt, ids) -> list[float]:
    """Log-probs of a pass over the whole row, one row, no cache."""
    logits = model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor([ids]).T)[:, 0].tolist()


def accepted(model, rank: int = 0, engine: bool = True):
    said: list[str] = []
    return agreeing_passes(model, LoraConfig(rank=rank), engine, said.append), said


@pytest.mark.parametrize("prompts", [MIXED, EQUAL], ids=["mixed lengths", "equal lengths"])
@pytest.mark.parametrize("family", [*HYBRID, "mamba", "bart", "mpt"])
def test_the_engine_samples_from_every_kind_of_layer_with_the_right_logprobs(family, prompts):
    model = tiny(family)
    samples = HfEngine(model).generate(prompts, range(3), SAMPLING, lambda: 0)
    assert len({len(sample.ids) for sample in samples}) > 1
    for index, sample in enumerate(samples):
        theirs = plain(model, prompts[index // 2], list(sample.ids))
        assert list(sample.logprobs) == pytest.approx(theirs, abs=1e-4)


def test_rows_leave_batches_of_several_prompt_lengths_as_they_do_one_of_padded_prompts():
    model = tiny("llama")
    sampling = Sampling(n=2, max_tokens=4, temperature=1.0, stop_ids=())
    with torch.inference_mode():
        apart = Apart(MIXED, sampling.n, [*map(len, MIXED)], lambda some, _: Decoder(model, some, sampling))
        padded = Decoder(model, MIXED, sampling)
        for kept in ([5, 0, 3, 2], [1, 0, 3, 3], [2]):
            for decoder in (apart, padded):
                decoder.select(torch.tensor(kept).numpy())
                decoder.step(torch.arange(10, 10 + len(kept)))
            assert torch.allclose(apart.logits, padded.logits, atol=1e-5)
    assert isinstance(make_decoder(model, MIXED, sampling), Decoder)
    assert isinstance(make_decoder(tiny("lfm2"), MIXED, sampling), Apart)


@pytest.mark.parametrize("family", HYBRID)
def test_a_hybrid_learns_from_whole_rows(family):
    assert accepted(tiny(family)) == (WHOLE, [])


def results(model, way):
    """Log-probs, entropies, and the gradient of a random sum of both, as one vector."""
    batch = random_batch(model, [17, 5, 11], [b // 4 for b in range(12)], [3, 1, 23, 8, 14, 2, 19, 1, 7, 11, 22, 5])
    model.zero_grad(set_to_none=True)
    logprobs, entropy = way.logprobs_and_entropy(model, batch, 0.7, entropy_gradient=True)
    weights = torch.rand(logprobs.shape, generator=torch.Generator().manual_seed(1)) * batch.mask_BT
    ((logprobs * weights).sum() + 0.3 * (entropy * weights).sum()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return (logprobs * batch.mask_BT).detach(), (entropy * batch.mask_BT).detach(), gradient


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_whole_rows_give_what_rows_with_shared_prompts_give(family):
    model = tiny(family)
    for ours, theirs in zip(results(model, WHOLE), results(model, PADDED), strict=True):
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def test_a_critic_values_whole_rows_as_it_does_rows_with_shared_prompts():
    critic = value_model(tiny("llama"), Head.token)
    torch.nn.init.normal_(critic.score.weight)
    batch = random_batch(critic, [9, 3], [0, 0, 1], [6, 2, 4])
    ours_BT, theirs_BT = WHOLE.values(critic, batch), response_values(critic, batch)
    assert torch.allclose(ours_BT * batch.mask_BT, theirs_BT * batch.mask_BT, atol=1e-5)


def test_a_micro_batch_of_whole_rows_counts_a_prompt_once_a_row():
    sizes = Sizes(prompts=[10, 2], prompt_of_B=[0, 0, 0, 1], responses_B=[5, 5, 5, 3])
    assert len(PADDED.split(sizes, range(4), budget=40)) == 1
    for part in (parts := WHOLE.split(sizes, range(4), budget=40)):
        assert len(part) * max(sizes.prompts[sizes.prompt_of_B[row]] + sizes.responses_B[row] for row in part) <= 40
    assert sorted(row for part in parts for row in part) == [0, 1, 2, 3] and len(parts) == 2


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "zamba2"])
def test_gradients_with_checkpointing_are_those_without(family):
    passes, _ = accepted(enable(tiny(family)))  # which compares them
    ours, theirs = results(enable(tiny(family)), passes), results(tiny(family), WHOLE)
    assert float((ours[2] - theirs[2]).norm()) <= 1e-5 * float(theirs[2].norm())


@pytest.mark.parametrize("family", ["gpt2", "glm4_moe", "mamba", "falcon"])
def test_an_adapter_is_merged_into_what_the_policy_computes_with_it(family, tmp_path):
    model, ids = tiny(family), torch.tensor([[3, 4, 5, 6, 7, 8]])
    before = {name: weight.clone() for name, weight in base_weights(model).items()}
    passes, _ = accepted(model, rank=2)
    assert passes in (PADDED, WHOLE)
    after = base_weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items()) and after.keys() == before.keys()
    assert all(parameter.requires_grad for parameter in model.parameters()) and not hasattr(model, "peft_config")
    add_adapter(model, 2, 4.0, [])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel()).view(parameter.shape))
        theirs, plain_model = model(ids).logits, tiny(family)
        base = plain_model(ids).logits
        plain_model.load_state_dict(merged(model).state_dict())
        assert torch.allclose(plain_model(ids).logits, theirs, atol=1e-5) and not torch.allclose(
            base, theirs, atol=1e-4
        )
        save_adapter(model, tmp_path, "")
        loaded = PeftModel.from_pretrained(tiny(family), str(tmp_path))
        assert torch.allclose(loaded(input_ids=ids).logits, theirs, atol=1e-4)


def test_an_adapter_of_layers_that_share_a_weight_is_refused_since_nobody_could_merge_it():
    accepted(tiny("zamba"))
    with pytest.raises(
        ValueError, match=r"here: its adapter cannot be merged into model\.layers\.4\.shared_transf\.[a-z_.]+: "
    ):
        accepted(tiny("zamba"), rank=2)


def test_an_adapter_leaves_alone_what_kernels_read_past_it_and_what_is_no_linear_layer():
    assert linear_layers(tiny("mamba")) == ["in_proj"]
    assert "router" not in linear_layers(tiny("llama4_text")) and "out_proj" in linear_layers(tiny("qwen3_next"))
    assert linear_layers(tiny("gpt2")) == ["c_attn", "c_fc", "c_proj"]
    with pytest.raises(
        ValueError, match=r"model\.lora\.target must be among the linear layers of MambaForCausalLM: in_"
    ):
        add_adapter(tiny("mamba"), 2, 4.0, ["out_proj"])


def test_an_adapter_that_was_put_on_and_off_leaves_the_layers_as_they_were():
    model = tiny("glm4_moe")
    kinds = {path: type(module) for path, module in model.named_modules()}
    add_adapter(model, 2, 4.0, [])
    assert {type(module) for module in model.modules()} > set(kinds.values())
    remove_adapter(model)
    assert {path: type(module) for path, module in model.named_modules()} == kinds


class Forgets(LlamaForCausalLM):
    """Its cache is lost on the way, as when an argument has another name."""

    def forward(self, input_ids, cache=None, **kwargs):
        return super().forward(
            input_ids, cache=type(cache)(config=self.config) if cache is not None else None, **kwargs
        )


SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_forgets_what_came_before_is_refused_by_the_engine(dtype):
    torch.manual_seed(0)
    model = Forgets(LlamaConfig(**SHAPE, initializer_range=0.5)).eval().to(dtype)
    with pytest.raises(
        ValueError,
        match=r"model\.path: Forgets cannot be trained here: the engine and its plain forward differ in log-probs \(by "
        r"[\d.]+ of their spread\)$",
    ):
        accepted(model)
    passes, said = accepted(model, engine=False)
    assert passes is WHOLE and said[0].startswith("learner: prompts are computed once a row, not once for all of their")
    with pytest.raises(ValueError, match=r"model\.path: Forgets cannot be sampled from: the engine and its plain"):
        check_engine(model)


REASONS = {
    "doge": "the learner and its plain forward differ in log-probs",  # its attention sees what comes later
    "rwkv": "the engine fails: RwkvForCausalLM takes no cache",
    "recurrent_gemma": "the engine fails: CausalLMOutput has no cache",  # it is in its layers
    "minimax": "the engine fails",
    "roberta": "the engine and its plain forward differ in log-probs",  # its positions begin at another number
}


@pytest.mark.parametrize("family", REASONS)
def test_what_cannot_be_computed_rightly_is_refused_in_one_line(family):
    with pytest.raises(ValueError) as error:
        accepted(tiny(family))
    assert str(error.value).startswith(f"model.path: {type(tiny(family)).__name__} cannot be trained here: ")
    assert REASONS[family] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "lfm2"])
def test_rounding_in_bfloat16_refuses_no_model(family):
    passes, said = accepted(tiny(family).to(torch.bfloat16), rank=2)
    assert passes is (WHOLE if family == "lfm2" else PADDED) and not said


@pytest.mark.parametrize("family", ["bamba", "mamba2"])
def test_a_worker_makes_a_model_with_infinite_settings(family):
    """transformers writes {"__float__": "Infinity"} into JSON."""
    model = tiny(family)
    told = WorkerSpec(architecture=architecture_of(model), endpoint={}, attention="eager").to_json()
    spec = WorkerSpec.from_json(told)
    assert build_model(spec).config.time_step_limit[1] == float("inf")


def test_a_configuration_of_which_transformers_makes_no_causal_lm_is_refused():
    with pytest.raises(ValueError, match="makes no causal LM from Emu3TextConfig, which is what a worker gets"):
        accepted(tiny("emu3"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5_text", "mamba", "gpt2", "glm4_moe", "doge"])
def test_a_run_on_a_checkpoint_of_any_family_is_right_or_ends_before_it_trains(rlhf_train, tmp_path, family):
    from rlhf.config import TinyModelConfig
    from rlhf.models.tokenizer import make_tokenizer

    save_model(tiny(family), make_tokenizer(TinyModelConfig(), "0123456789+-= ", chat=False), tmp_path / "model")
    options = ["task=arithmetic", "steps=1", "prompts_per_step=2", "samples_per_prompt=2", "task.held_out=4"]
    lora = ["model.lora.rank=2", "model.gradient_checkpointing=true"] if family in ("gpt2", "glm4_moe") else []
    path = f"model.path={tmp_path}/model"
    done = rlhf_train("experiment=checkpoint", path, "rollout.max_new_tokens=4", *options, *lora, "hydra.run.dir=run")
    if family == "doge":
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "model.path: DogeForCausalLM cannot be trained here" in done.stderr
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["train/mismatch"] < 1e-5 for row in rows if "train/mismatch" in row)


WITHOUT_LAYERS = {"ctrl", "gpt_neox_japanese"}  # to checkpoint
FEWER_WAYS = {  # refused by one way at least, in one line
    *("camembert", "cpmant", "data2vec-text", "doge", "emu3", "gemma4_unified_assistant", "git", "longcat_flash"),
    *("minimax", "mllama", "moshi", "openai-gpt", "prophetnet", "recurrent_gemma", "reformer", "roberta"),
    *("roberta-prelayernorm", "rwkv", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xlstm", "xmod", "zamba"),
}
NOT_TINY = {"blt", "cohere_compass_text", "dbrx", "dots3_note", "dots3_note_text", "gemma3n", "gemma4_assistant"}
NOT_TINY |= {"musicgen", "musicgen_melody", "phi4_multimodal"}


@pytest.mark.parametrize("every", [in_ci(5), in_full(1)])
def test_of_the_families_of_transformers_none_is_wrong_and_each_is_right_or_refused(every):
    assert len(FAMILIES) == 196
    rows = [judged(family) for family in FAMILIES[::every]]
    families = {row.family for row in rows}
    assert not [row for row in rows if WRONG in row.ways]
    assert {row.family for row in rows if REFUSED in row.ways} == (FEWER_WAYS | WITHOUT_LAYERS) & families
    assert {row.family for row in rows if NOT_MADE in row.ways} == NOT_TINY & families
