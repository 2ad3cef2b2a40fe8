"""MFU: operations as one counts them by hand and as torch does, peaks of devices, and nothing that is unknown."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf.models.adapter import add_adapter
from rlhf.monitor.flops import Meter, Row, Shape, peak_of, shape_of
from rlhf.run import run
from rlhf.types import Completion, Prompt, Rollouts

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
LATENT |= {
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "head_dim": 4,
    "num_key_value_heads": 4,
}


def model_of(kind: str, **more):
    config = CONFIG_MAPPING[kind](**SMALL | more)
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()  # which torch counts


def test_a_layer_counts_its_weights_each_token_and_attention_by_the_tokens_that_are_seen():
    shape = Shape(trained=100, output=10, attention=[(8, None)])
    rows = [Row(prompt=3, answer=2)]
    assert shape.forward(rows) == 2 * 100 * 5 + 2 * 10 * 2 + 2 * 8 * (1 + 2 + 3 + 4 + 5)
    assert shape.training(rows) == 3 * shape.forward(rows)


def test_a_window_bounds_what_a_token_sees():
    assert Shape(trained=0, attention=[(1, 3)]).forward([Row(4, 2)]) == 2 * (1 + 2 + 3 + 3 + 3 + 3)
    assert Shape(trained=0, attention=[(1, 64)]).forward([Row(4, 2)]) == 2 * 21


def test_below_an_adapter_there_are_no_gradients_of_weights():
    assert Shape(trained=1, frozen=100, output=10, output_trained=False).training([Row(3, 2)]) == (
        6 * 1 * 5 + 4 * 100 * 5 + 4 * 10 * 2
    )


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen3", {}),
        ("llama", {"head_dim": 16}),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        ("qwen3_moe", EXPERTS | {"num_experts": 8}),
        ("deepseek_v3", EXPERTS | LATENT),
    ],
)
def test_torch_counts_the_same_operations_of_a_pass_and_its_gradients(kind, more):
    model, tokens, answer = model_of(kind, **more), 40, 40
    shape = shape_of(model)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.arange(tokens)[None] % 96, use_cache=False).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    row = Row(tokens - answer, answer)
    square = tokens - (tokens + 1) / 2  # torch counts tokens that are not seen, too
    masked = sum(2 * size * tokens * square for size, _ in shape.attention)
    assert shape.forward([row]) + masked == pytest.approx(forward, rel=0.03)
    assert shape.training([row]) + 3 * masked == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_of_a_policy_with_an_adapter_the_adapter_alone_learns():
    pytest.importorskip("peft")
    model = model_of("qwen3")
    whole = shape_of(model)
    add_adapter(model, 4, 8, ["q_proj", "down_proj"])
    shape = shape_of(model)
    assert (shape.frozen, shape.output, shape.output_trained) == (whole.trained, whole.output, False)
    assert shape.trained == sum(p.numel() for n, p in model.named_parameters() if "lora" in n)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("qwen3_next", EXPERTS | {"num_experts": 8}), ("mamba", {}), ("llama4_text", {"num_local_experts": 2})],
)
def test_of_layers_that_are_not_known_nothing_is_counted(kind, more):
    with torch.device("meta"):
        assert shape_of(model_of(kind, **more)) is None


def test_peaks_are_those_of_devices_that_are_known():
    assert peak_of("NVIDIA H200", half=True) == peak_of("NVIDIA H100 80GB HBM3", half=True) == 989e12
    assert peak_of("NVIDIA A100-SXM4-80GB", half=True) == peak_of("NVIDIA A100 80GB PCIe", half=True) == 312e12
    assert (peak_of("NVIDIA L40S", half=True), peak_of("NVIDIA B200", half=True)) == (362e12, 2250e12)
    assert peak_of("NVIDIA H200", half=False) == 67e12
    unknown = ("NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla V100-SXM2-16GB", "")
    assert [peak_of(name, half=True) for name in unknown] == [None] * 4


def test_a_step_is_a_pass_with_gradients_and_those_of_reference_critic_and_old_log_probs():
    shape, rows = Shape(trained=100, output=10, attention=[(8, None)]), [Row(3, 2), Row(4, 1)]
    once, learned = shape.forward(rows), shape.training(rows)
    assert Meter(shape=shape, peak=1e3).flops(rows) == learned
    assert Meter(shape=shape, peak=1e3, reference=True).flops(rows, rows[1:]) == learned + once + shape.forward(
        rows[1:]
    )
    critic = Shape(trained=100, attention=[(8, None)])
    assert Meter(shape=shape, peak=1e3, critic=True).flops(rows) == learned + 4 * critic.forward(rows)
    assert Meter(shape=shape, peak=1e3).mfu(rows, 2.0) == learned / 2.0 / 1e3


def test_of_samples_each_row_has_a_prompt_of_its_own_and_later_updates_rows_need_old_log_probs():
    completions = [Completion([1] * n, [0.0] * n, [0] * n, "length") for n in (1, 2, 3, 4)]
    prompts = [Prompt("", (1,) * 5), Prompt("", (1,) * 7)]
    rollouts = Rollouts(prompts, completions, [""] * 4, [0, 1], samples_per_prompt=2)
    rows, shape = [Row(5, 1), Row(5, 2), Row(7, 3), Row(7, 4)], Shape(trained=100)
    assert Meter(shape=shape, peak=1.0).of_step(rollouts, 1.0) == shape.training(rows)
    expected = shape.training(rows) + shape.forward(rows[2:])
    assert Meter(shape=shape, peak=1.0, updates=2).of_step(rollouts, 1.0) == expected


def test_on_a_cpu_there_is_no_mfu(compose_run):
    assert Meter.of(model_of("qwen3"), compose_run()) is None


def test_a_run_is_measured_by_what_its_algorithm_computes(compose_run, monkeypatch):
    monkeypatch.setattr("rlhf.monitor.flops._peak", lambda policy: 1e12)
    model = model_of("qwen3")
    grpo, ppo, dpo = (Meter.of(model, compose_run(f"algo={name}")) for name in ("grpo", "ppo", "dpo"))
    assert (grpo.reference, grpo.critic) == (True, False) and ppo.critic
    assert (dpo.reference, dpo.critic, dpo.updates) == (False, False, 1)
    strange = SimpleNamespace(config=SimpleNamespace())
    assert Meter.of(strange, compose_run()) is None


@pytest.mark.parametrize("algo", ["algo=grpo", "algo=dpo algo.prompts=32 prompts_per_step=4"])
def test_a_run_on_a_device_that_is_known_logs_its_mfu(compose_run, tmp_path, monkeypatch, algo):
    monkeypatch.setattr("rlhf.monitor.flops._peak", lambda policy: 1e12)
    small = (
        "experiment=smoke",
        "logger=jsonl",
        "transfer=local",
        "sft.steps=2",
        "steps=2",
        "task.held_out=8",
        "task.prompts=64",
    )
    summary = run(compose_run(*small, *algo.split()), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [row["train/mfu"] for row in rows if "seconds/step" in row]
    assert len(logged) == 2 and all(0 < mfu < 1 for mfu in logged)
    assert min(logged) <= summary["mfu"] <= max(logged)
