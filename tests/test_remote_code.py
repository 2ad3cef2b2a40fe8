"""Checkpoints with code of their own: refused in one line, or trusted by a key; never asked about or run unasked."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from chat_checkpoint import chat_checkpoint, write_conversations

from rlhf.config import Device, HfModelConfig, HfRolloutConfig, TinyModelConfig
from rlhf.models.policy import make_policy, reload
from rlhf.models.reward_model import load_reward_model
from rlhf.models.saving import export_model, save_model
from rlhf.models.tokenizer import make_tokenizer
from rlhf.models.value import Head, value_model
from rlhf.rollout.build import build_model, config_of
from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.spec_of_run import worker_spec
from rlhf.rollout.vllm import manifest_of
from rlhf.rollout.vllm_model import class_of, model_folder
from rlhf.run import run

RAN = "from pathlib import Path\nwith Path({ran!r}).open('a') as file:\n    file.write(__name__ + '\\n')\n"
CONFIGURATION = "from transformers import PhiConfig\n\n\nclass OwnConfig(PhiConfig):\n    model_type = '{kind}'\n"
MODELING = """import torch
from transformers import PhiForCausalLM, PhiModel
from transformers.models.phi.modeling_phi import PhiPreTrainedModel

from .configuration_own import OwnConfig


class OwnForCausalLM(PhiForCausalLM):
    config_class = OwnConfig


class OwnForSequenceClassification(PhiPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = PhiModel(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
"""
TOKENIZATION = """from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    "AutoModelForSequenceClassification": "modeling_own.OwnForSequenceClassification",
}


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def ran(tmp_path):
    """The file in which each piece of a checkpoint's code notes that it was run."""
    return tmp_path / "ran"


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory):
    """Where transformers copies code to before it runs it, for this process and for workers."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setenv("HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    def asked(*_):
        raise AssertionError("somebody was asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)


@pytest.fixture
def own(tmp_path, ran, request):
    """A checkpoint whose config and model are its own; each test has another type of model, as transformers learns."""
    folder = chat_checkpoint(tmp_path / f"own_{abs(hash(request.node.nodeid))}")
    kind = f"own{abs(hash(request.node.nodeid))}"
    noting = RAN.format(ran=str(ran))
    (folder / "configuration_own.py").write_text(noting + CONFIGURATION.format(kind=kind))
    (folder / "modeling_own.py").write_text(noting + MODELING)
    change(folder / "config.json", model_type=kind, architectures=["OwnForCausalLM"], auto_map=AUTO_MAP)
    return folder


@pytest.fixture
def overrides(own, tmp_path):
    data = write_conversations(tmp_path / "talk.jsonl")
    tiny = "experiment=smoke model=hf steps=1 sft.steps=0 task=jsonl task.held_out=8 logger=jsonl"
    return [*tiny.split(), f"model.path={own}", f"task.path={data}", "rollout.max_new_tokens=4"]


def loaded(folder, **options):
    config = HfModelConfig(path=str(folder), device=Device.cpu, **options)
    tokenizer = make_tokenizer(config, "", chat=False)
    return make_policy(config, tokenizer, 0), tokenizer


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[8, 9, 10]])).logits.float()


# --- without trust ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_with_code_of_its_own_is_refused_in_one_line_before_anything_starts_and_nothing_of_it_is_run(
    overrides, own, ran, compose_run, tmp_path
):
    with pytest.raises(
        ValueError, match=r"^model\.trust_remote_code is false, and the folder \S+ brings code"
    ) as error:
        run(compose_run(*overrides), tmp_path / "run")
    assert "\n" not in str(error.value) and str(own) in str(error.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]
    assert not ran.exists()


def test_a_reward_model_with_code_of_its_own_is_refused_by_its_own_key(own, ran):
    change(own / "config.json", num_labels=1)
    with pytest.raises(ValueError, match=r"^reward\.trust_remote_code is false, and .* another reward\.path$"):
        load_reward_model(str(own), TinyModelConfig(device=Device.cpu))
    assert not ran.exists()


def test_a_part_of_a_sum_names_its_own_key(overrides, own, compose_run, tmp_path):
    model = chat_checkpoint(tmp_path / "plain")
    part = f"{{shown: {{kind: model, path: {own}}}}}"
    given = [override for override in overrides if not override.startswith("model.path")]
    with pytest.raises(ValueError, match=r"^reward\.parts\.shown\.trust_remote_code is false"):
        run(compose_run(*given, f"model.path={model}", "reward=sum", f"reward.parts={part}"), tmp_path / "run")


def test_a_tokenizers_own_code_is_run_with_trust_alone(tmp_path, ran):
    folder = chat_checkpoint(tmp_path / "chat")
    (folder / "tokenization_own.py").write_text(RAN.format(ran=str(ran)) + TOKENIZATION)
    map_ = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=map_)
    _, tokenizer = loaded(folder)
    assert type(tokenizer).__module__.startswith("transformers.") and not ran.exists()
    _, tokenizer = loaded(folder, trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer" and ran.exists()


def test_of_a_model_that_transformers_knows_its_own_code_is_not_run_and_is_saved_all_the_same(tmp_path, ran):
    folder = chat_checkpoint(tmp_path / "chat")
    (folder / "modeling_own.py").write_text(RAN.format(ran=str(ran)) + MODELING)
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    policy, tokenizer = loaded(folder)
    assert type(policy).__module__.startswith("transformers.models.phi")
    export_model(policy, tokenizer, tmp_path / "out", None)
    for name in ("modeling_own.py", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not ran.exists()


# --- with trust -------------------------------------------------------------------------------------------------------


def test_with_trust_a_run_trains_and_saves_a_folder_that_loads_again(overrides, own, ran, compose_run, tmp_path):
    from transformers import AutoModelForCausalLM

    trusting = [*overrides, "model.trust_remote_code=true", "transfer=local", "checkpoint.every=1"]
    run(compose_run(*trusting, "sft.steps=2", "sft.lr=0.05"), tmp_path / "run")
    saved = tmp_path / "run" / "policy"
    assert "configuration_own" in ran.read_text() and "modeling_own" in ran.read_text()
    for name in ("configuration_own.py", "modeling_own.py", "config.json"):
        assert (saved / name).read_bytes() == (own / name).read_bytes()
    policy, _ = loaded(saved, trust_remote_code=True)
    plain = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    first, _ = loaded(own, trust_remote_code=True)
    assert type(policy).__name__ == type(plain).__name__ == "OwnForCausalLM"
    assert torch.allclose(logits(policy), logits(plain.float()))
    assert not torch.equal(logits(policy), logits(first)), "it has learned"


def test_with_trust_a_worker_makes_the_same_model_from_its_spec(overrides, own, compose_run):
    policy, _ = loaded(own, trust_remote_code=True)
    spec = worker_spec(policy, compose_run(*overrides, "model.trust_remote_code=true"), {"backend": "local"})
    assert spec.code == str(own)
    model = build_model(WorkerSpec.from_json(spec.to_json()))
    assert type(model).__name__ == "OwnForCausalLM"
    model.load_state_dict(policy.state_dict())
    assert torch.equal(logits(model), logits(policy))


def test_without_code_of_its_own_a_worker_trusts_nobody(compose_run, tmp_path):
    policy, _ = loaded(chat_checkpoint(tmp_path / "chat"), trust_remote_code=True)
    config = compose_run("experiment=smoke")
    assert worker_spec(policy, config, {"backend": "local"}).code == ""


def test_with_trust_a_reward_model_loads_and_the_policys_own_is_made_of_its_code(own, tmp_path):
    policy, tokenizer = loaded(own, trust_remote_code=True)
    model = value_model(policy, Head.sequence)
    assert type(model).__name__ == "OwnForSequenceClassification"
    export_model(model, tokenizer, tmp_path / "reward", None)
    config = TinyModelConfig(device=Device.cpu)
    with pytest.raises(ValueError, match=r"^reward\.trust_remote_code is false"):
        load_reward_model(str(tmp_path / "reward"), config)
    again, _ = load_reward_model(str(tmp_path / "reward"), config, trust=True)
    assert type(again).__name__ == "OwnForSequenceClassification"


def test_a_checkpoint_of_a_resume_brings_weights_and_runs_no_code(own, tmp_path):
    policy, tokenizer = loaded(own, trust_remote_code=True)
    with torch.no_grad():
        policy.lm_head.bias.add_(0.125)
    save_model(policy, tokenizer, tmp_path / "out")
    (tmp_path / "out" / "modeling_own.py").write_text("raise SystemExit('run')\n")
    again, _ = loaded(own, trust_remote_code=True)
    reload(again, tmp_path / "out")
    assert torch.equal(again.lm_head.bias, policy.lm_head.bias)


@pytest.mark.parametrize("trusted", [False, True])
def test_vllm_is_told_explicitly_whether_to_trust_and_gets_the_code_with_the_config(
    own, compose_run, tmp_path, trusted, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    policy, _ = loaded(own if trusted else chat_checkpoint(tmp_path / "chat"), trust_remote_code=True)
    spec = worker_spec(policy, compose_run("experiment=smoke"), {"backend": "local"})
    with model_folder(spec) as folder:
        code = {path.name for path in type(tmp_path)(folder).glob("*.py")}
    assert code == ({"configuration_own.py", "modeling_own.py"} if trusted else set())
    assert class_of(spec) == ("OwnForCausalLM" if trusted else "PhiForCausalLM")
    assert manifest_of(config_of(spec), spec).entries

    from rlhf.rollout.vllm import _llm

    assert _llm(lambda **arguments: arguments, spec)["trust_remote_code"] is trusted


def test_vllms_own_dial_for_trust_is_not_a_way_around_the_key():
    from rlhf.config import VllmRolloutConfig

    with pytest.raises(ValueError, match=r"engine_args\.trust_remote_code is set by .* model\.trust_remote_code"):
        VllmRolloutConfig(engine_args={"trust_remote_code": True})
    assert HfRolloutConfig()


@pytest.mark.slow
@pytest.mark.parametrize("options", ["transfer=ipc", "transfer=disk model.lora.rank=2 sft.steps=1"])
def test_with_trust_worker_processes_train_and_resume(overrides, own, compose_run, tmp_path, options):
    trusting = [*overrides, "model.trust_remote_code=true", "checkpoint.every=1", *options.split()]
    run(compose_run(*trusting), tmp_path / "run")
    run(compose_run(*trusting, "steps=2"), tmp_path / "run", resume=True)
    policy, _ = loaded(tmp_path / "run" / "policy", trust_remote_code=True)
    assert type(policy).__name__ == "OwnForCausalLM"
