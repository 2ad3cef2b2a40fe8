"""LoRA: only the adapter learns and travels, the base is the reference, and what is saved loads without the project."""

import copy
import importlib.util
import json

import pytest
import torch
from test_learner import gradients, sampled

from rlhf.config import LoraConfig, TinyModelConfig
from rlhf.learning.forward import collate, response_logprobs
from rlhf.learning.learner import Learner
from rlhf.models.adapter import (
    add_adapter,
    base_weights,
    has_adapter,
    save_adapter,
    sent_weights,
    spec_of,
    without_adapter,
)
from rlhf.models.merging import merged
from rlhf.models.policy import make_policy
from rlhf.models.saving import save_model
from rlhf.models.tokenizer import make_tokenizer
from rlhf.models.value import Head, value_model
from rlhf.rollout.build import architecture_of, build_model
from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.worker import Worker
from rlhf.run import run

IDS = torch.tensor([[3, 4, 5, 6, 7, 3]])
REWARDS = [float(b % 2) for b in range(12)]


def tokenizer():
    return make_tokenizer(TinyModelConfig(), "abcdefghi", chat=False)


def plain(**dials):
    return make_policy(TinyModelConfig(hidden=32, heads=2, intermediate=48, **dials), tokenizer(), seed=1)


def adapted(moved: bool = True, target: tuple[str, ...] = (), **dials):
    """A policy with an adapter, which after a few steps would say something of its own."""
    policy = plain(**dials)
    add_adapter(policy, rank=4, alpha=8, target=list(target), seed=3)
    if moved:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in sent_weights(policy).values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return policy


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in base_weights(model).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the adapter ------------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_is_all_that_learns():
    policy = adapted(moved=False)
    assert torch.equal(logits(policy), logits(plain()))
    assert same(state(policy), dict(plain().state_dict()))
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == set(sent_weights(policy))
    assert all(".lora_" in name for name in sent_weights(policy)) and not policy.training


def test_without_its_adapter_a_policy_is_its_base_and_learns_afterwards_as_before():
    policy = adapted()
    mine = logits(policy)
    learning = {n for n, p in policy.named_parameters() if p.requires_grad}
    with without_adapter(policy):
        assert torch.equal(logits(policy), logits(plain()))
    assert torch.equal(logits(policy), mine) and not torch.allclose(mine, logits(plain()), atol=1e-2)
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == learning


def test_target_names_layers_and_one_that_is_not_there_is_answered_with_those_that_are():
    policy = adapted(target=("q_proj", "v_proj"))
    assert {name.split(".")[-4] for name in sent_weights(policy)} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"^model\.lora\.target must be .*: down_proj, .*v_proj \(got query\)"):
        adapted(target=("q_proj", "query"))


def test_a_reward_model_begins_with_the_base():
    ours, theirs = (value_model(policy, Head.token).state_dict() for policy in (adapted(), plain()))
    assert same(dict(ours), dict(theirs))


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_learner(compose_run):
    def make(policy, reference, *overrides: str) -> Learner:
        return Learner(policy, reference, None, compose_run("model.lora.rank=4", "optim.lr=0.01", *overrides))

    return make


def test_the_base_is_the_reference_and_no_step_changes_it(make_learner):
    policy = adapted()
    learner, twin = make_learner(policy, policy), make_learner(copy.deepcopy(policy), plain())
    before = state(policy)
    for _ in range(3):
        ours, theirs = (each.learn(each.score(sampled()), REWARDS) for each in (learner, twin))
        assert ours == theirs and ours["kl"] > 1e-3 and ours["grad_norm"] > 0
    assert same(state(policy), before)
    assert learner.weights().keys() == sent_weights(policy).keys()
    assert not same(learner.weights(), sent_weights(adapted()))


def test_an_adapter_has_the_same_gradients_with_checkpointing(make_learner):
    found = []
    for recompute in (False, True):
        policy = adapted(gradient_checkpointing=recompute)
        found.append(gradients(make_learner(policy, policy), sampled(), list(REWARDS)))
    assert found[0].abs().max() > 1e-4
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()


# --- workers ----------------------------------------------------------------------------------------------------------


def spec(policy, base: str, dtype: str = "float32") -> WorkerSpec:
    adapter = spec_of(policy, LoraConfig(rank=4, alpha=8), base, getattr(torch, dtype))
    told = WorkerSpec(architecture=architecture_of(policy), endpoint={"backend": "local"}, dtype=dtype, adapter=adapter)
    return WorkerSpec.from_json(told.to_json())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_worker_holds_the_base_bit_for_bit_and_takes_the_adapter_alone(tmp_path, dtype):
    policy = adapted()
    save_model(plain(), tokenizer(), tmp_path)
    model = build_model(spec(policy, str(tmp_path), dtype))
    assert same(state(model), {n: t.to(getattr(torch, dtype)) for n, t in state(policy).items()})
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for name, tensor in sent_weights(model).items():
            tensor.copy_(sent_weights(policy)[name])
    assert torch.allclose(logits(model).float(), logits(policy), atol=1e-6 if dtype == "float32" else 0.1)
    names = {
        name
        for entry in Worker.around(model, {"backend": "local"})._receiver._landing.manifest.entries
        for name in entry.names
    }
    assert names == set(sent_weights(policy))


def test_a_worker_with_another_base_than_the_trainers_does_not_start(tmp_path):
    policy, other = adapted(), plain()
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-6
    save_model(other, tokenizer(), tmp_path)
    with pytest.raises(ValueError, match=r"have the digest xxh3:\w+, and those that the trainer's adapter builds on"):
        build_model(spec(policy, str(tmp_path)))


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_the_merged_policy_loads_with_transformers_and_the_adapter_with_peft_on_its_base(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = adapted()
    save_model(plain(), tokenizer(), tmp_path / "base")
    save_model(merged(policy), tokenizer(), tmp_path / "policy")
    save_adapter(policy, tmp_path / "adapter", base=str(tmp_path / "base"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert not has_adapter(loaded) and loaded.config.eos_token_id == policy.config.eos_token_id
    assert torch.allclose(logits(loaded), logits(policy), atol=1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    with_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(with_peft), logits(policy))


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param("algo=dpo prompts_per_step=2 samples_per_prompt=8 algo.prompts=32", marks=pytest.mark.slow),
        "algo=ppo algo.critic_warmup_steps=1 reward=model reward.steps=3 reward.prompts=32",
    ],
)
def test_every_stage_takes_a_policy_with_an_adapter(compose_run, tmp_path, overrides):
    smoke = "experiment=smoke steps=2 sft.steps=20 task.held_out=8 logger=jsonl transfer=local model.lora.rank=4"
    run(compose_run(*smoke.split(), *overrides.split(), "optim.lr=0.01"), tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum("train/loss" in row and row["train/grad_norm"] > 0 for row in steps) == 2
    assert {"policy", "adapter", "base"} <= {path.name for path in tmp_path.iterdir()}


def test_a_checkpoint_that_no_warm_up_changes_is_the_base_itself(compose_run, tmp_path):
    save_model(plain(), make_tokenizer(TinyModelConfig(), "abcdef=", chat=False), tmp_path / "checkpoint")
    checkpoint = f"model=hf model.path={tmp_path}/checkpoint sft.steps=0 model.lora.rank=2"
    smoke = "experiment=smoke steps=2 task.held_out=8 logger=jsonl transfer=local"
    run(compose_run(*smoke.split(), *checkpoint.split()), tmp_path / "run")
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "checkpoint")
    assert not (tmp_path / "run" / "base").exists()


def test_without_peft_a_run_says_in_one_line_which_extra_has_it(compose_run, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else found(name, *rest))
    with pytest.raises(ValueError, match=r"^model\.lora\.rank needs the package peft: .*\[lora\]"):
        run(compose_run("experiment=smoke", "model.lora.rank=4", "logger=jsonl"), tmp_path)


def test_batches_of_an_adapter_are_computed_with_their_prompts_shared():
    policy, batch = adapted(), collate(sampled(), torch.device("cpu"))
    with torch.no_grad():
        ours = response_logprobs(policy, batch, 1.0)
        row = sampled().completions[5]
        prompt = sampled().prompts_B[5].ids
        alone = policy(torch.tensor([[*prompt, *row.ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert torch.allclose(ours[5, : len(row.ids)], alone[torch.arange(len(row.ids)), list(row.ids)], atol=1e-5)
