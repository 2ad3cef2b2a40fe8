"""What a run leaves of a checkpoint: dtypes, configs, and files that nobody trains are as they came."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack

import pytest
import torch
from chat_checkpoint import GENERATION, TEMPLATE, chat_checkpoint, write_conversations
from safetensors.torch import load_file, save_file

from rlhf.check import human
from rlhf.config import Device, HfModelConfig, Precision, TinyModelConfig
from rlhf.models.policy import make_policy, reload
from rlhf.models.saving import export_model, save_model
from rlhf.models.tokenizer import make_tokenizer
from rlhf.models.value import Head, value_model
from rlhf.run import run

BROUGHT = {
    "preprocessor_config.json": b'{"image_mean": [0.5]}',
    "special_tokens_map.json": b'{"eos_token": "<eos>"}',
    "spiece.model": b"\x00\x01",
    "own_code.py": b"raise SystemExit('run')\n",
    "LICENSE.txt": b"yours",
    "chat_template.jinja": TEMPLATE.encode(),
}
NOT_BROUGHT = ("optimizer.pt", "README.md", "trainer_state.json")


@pytest.fixture
def checkpoint(tmp_path):
    folder = chat_checkpoint(tmp_path / "chat")
    for name, content in BROUGHT.items():
        (folder / name).write_bytes(content)
    for name in NOT_BROUGHT:
        (folder / name).write_text("{}")
    return folder


def loaded(folder, **options):
    config = HfModelConfig(path=str(folder), device=Device.cpu, **options)
    tokenizer = make_tokenizer(config, "", chat=False)
    return make_policy(config, tokenizer, 0), tokenizer


def dtypes(folder):
    return {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}


def small(folder):
    """What is in a folder but for its weights."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}


@pytest.fixture
def overrides(checkpoint, tmp_path):
    data = write_conversations(tmp_path / "talk.jsonl")
    tiny = "experiment=smoke model=hf steps=1 sft.steps=0 task=jsonl task.held_out=8 transfer=local logger=jsonl"
    return [*tiny.split(), f"model.path={checkpoint}", f"task.path={data}", "rollout.max_new_tokens=4"]


def test_a_policy_that_was_trained_in_fp32_is_saved_in_its_checkpoints_dtype_beside_the_files_that_it_came_with(
    checkpoint, overrides, compose_run, tmp_path
):
    from transformers import AutoModelForCausalLM

    run(compose_run(*overrides, "checkpoint.every=1"), tmp_path / "run")
    before, after = small(checkpoint), small(tmp_path / "run" / "policy")
    assert dtypes(tmp_path / "run" / "policy") == dtypes(checkpoint)
    assert set(dtypes(checkpoint).values()) == {torch.bfloat16}
    assert after == {name: content for name, content in before.items() if name not in NOT_BROUGHT}
    assert json.loads(after["config.json"])["resid_pdrop"] == 0.1, "what training leaves out is not saved as left out"
    kept = tmp_path / "run" / "checkpoints" / "00000001" / "policy"
    assert set(dtypes(kept).values()) == {torch.float32}, "a resume goes on from the very weights"
    told = json.loads((kept / "config.json").read_text())
    assert told == json.loads(before["config.json"]) | {"dtype": "float32"}
    assert json.loads((kept / "generation_config.json").read_text()) == GENERATION
    exact, cast = load_file(kept / "model.safetensors"), load_file(tmp_path / "run" / "policy" / "model.safetensors")
    assert all(torch.equal(exact[name].bfloat16(), tensor) for name, tensor in cast.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy", dtype="auto")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("precision", list(Precision))
def test_a_dial_says_in_which_dtype_a_policy_is_saved(checkpoint, tmp_path, precision):
    policy, tokenizer = loaded(checkpoint)
    export_model(policy, tokenizer, tmp_path / "out", precision)
    assert {str(dtype) for dtype in dtypes(tmp_path / "out").values()} == {f"torch.{precision.value}"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == precision.value


def test_a_tiny_model_is_saved_as_it_was_trained_unless_a_dial_says_otherwise(tmp_path):
    config = TinyModelConfig(layers=1, hidden=32, heads=2, intermediate=48, device=Device.cpu)
    tokenizer = make_tokenizer(config, "abc", chat=False)
    policy = make_policy(config, tokenizer, 0)
    for name, precision in (("float32", None), ("bfloat16", Precision.bfloat16)):
        export_model(policy, tokenizer, tmp_path / name, precision)
        assert {str(dtype) for dtype in dtypes(tmp_path / name).values()} == {f"torch.{name}"}
        told = json.loads((tmp_path / name / "config.json").read_text())
        assert (told["dtype"], told["tie_word_embeddings"]) == (name, True)
        assert "lm_head.weight" not in dtypes(tmp_path / name), "tied weights are there once, in any dtype"


def test_the_estimate_of_a_check_knows_in_which_dtype_a_policy_will_be_saved(
    checkpoint, overrides, compose_run, tmp_path, capsys
):
    from rlhf.assembly.matter import gathered
    from rlhf.assembly.site import opened
    from rlhf.check import _tell
    from rlhf.ranks.place import Place

    told = {}
    for options in ((), ("model.save_dtype=float32",)):
        config = compose_run(*overrides, *options)
        with ExitStack() as stack:
            site = opened(config, tmp_path / "run", stack, Place())
            _tell(site, gathered(site), tmp_path / "run", "run")
        told[options] = re.search(r"  policy +\S* +([\d.]+ \w+)", capsys.readouterr().out.partition("disk")[2])[1]
    policy, _ = loaded(checkpoint)
    nbytes = sum(parameter.numel() for parameter in policy.parameters())
    assert told == {(): human(2 * nbytes), ("model.save_dtype=float32",): human(4 * nbytes)}


def test_each_tensor_has_the_dtype_that_it_had_also_where_they_differ(checkpoint, tmp_path):
    weights = load_file(checkpoint / "model.safetensors")
    router = "model.layers.0.mlp.fc1.bias"
    weights[router] = weights[router].float()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    policy, tokenizer = loaded(checkpoint)
    with torch.no_grad():
        policy.get_parameter(router).add_(1e-6)
    export_model(policy, tokenizer, tmp_path / "out", None)
    assert dtypes(tmp_path / "out") == {name: tensor.dtype for name, tensor in weights.items()}
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(saved[router], policy.get_parameter(router)), "nothing is rounded that was not"


def test_only_the_weights_that_transformers_loads_tell_a_dtype(checkpoint, tmp_path):
    before, names = dtypes(checkpoint), list(load_file(checkpoint / "model.safetensors"))
    others = {name: torch.ones(1) for name in (*names, *(f"original.{n}" for n in range(99)))}
    save_file(others, checkpoint / "original.safetensors")
    save_file(others, checkpoint / "model2.safetensors")
    (checkpoint / "optimizer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (checkpoint / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    policy, tokenizer = loaded(checkpoint)
    export_model(policy, tokenizer, tmp_path / "out", None)
    assert dtypes(tmp_path / "out") == before


def test_weights_in_several_files_tell_the_dtype_of_each_tensor(checkpoint, tmp_path):
    weights, one = load_file(checkpoint / "model.safetensors"), "model.layers.0.mlp.fc1.bias"
    (checkpoint / "model.safetensors").unlink()
    weights[one] = weights[one].float()
    files = {name: "b.safetensors" if name == one else "a.safetensors" for name in weights}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({n: t for n, t in weights.items() if files[n] == file}, checkpoint / file, metadata={"format": "pt"})
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    policy, tokenizer = loaded(checkpoint)
    export_model(policy, tokenizer, tmp_path / "out", None)
    assert dtypes(tmp_path / "out") == {name: tensor.dtype for name, tensor in weights.items()}


def test_a_policy_of_a_checkpoint_with_its_weights_under_another_name_can_be_loaded(checkpoint, tmp_path):
    told = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(told | {"transformers_weights": "mine.safetensors"}))
    before = dtypes(checkpoint)
    (checkpoint / "model.safetensors").rename(checkpoint / "mine.safetensors")
    policy, tokenizer = loaded(checkpoint)
    export_model(policy, tokenizer, tmp_path / "out", None)
    assert dtypes(tmp_path / "out") == before and json.loads((tmp_path / "out" / "config.json").read_text()) == told
    again, _ = loaded(tmp_path / "out")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in policy.state_dict().items())


def test_weights_whose_dtypes_no_safetensors_tell_follow_config_json(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(tmp_path / "weights")
    torch.save(load_file(tmp_path / "weights"), checkpoint / "pytorch_model.bin")
    policy, tokenizer = loaded(checkpoint)
    export_model(policy, tokenizer, tmp_path / "out", None)
    assert set(dtypes(tmp_path / "out").values()) == {torch.bfloat16}


def test_a_reward_model_of_a_checkpoint_has_its_dtype_and_its_tokenizer_and_generates_nothing(checkpoint, tmp_path):
    policy, tokenizer = loaded(checkpoint)
    export_model(value_model(policy, Head.sequence), tokenizer, tmp_path / "out", None)
    assert set(dtypes(tmp_path / "out").values()) == {torch.bfloat16}
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (told["dtype"], told["architectures"]) == ("bfloat16", ["PhiForSequenceClassification"])
    files = small(tmp_path / "out")
    assert files["tokenizer_config.json"] == (checkpoint / "tokenizer_config.json").read_bytes()
    assert "generation_config.json" not in files


def test_a_generation_config_without_stop_ids_gets_those_of_the_run_and_nothing_else(tmp_path):
    chat_checkpoint(tmp_path / "chat", {"temperature": 0.6, "do_sample": True})
    policy, tokenizer = loaded(tmp_path / "chat")
    save_model(policy, tokenizer, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert told == {"temperature": 0.6, "do_sample": True, "eos_token_id": tokenizer.eos_token_id}


def test_a_generation_config_that_transformers_would_not_write_is_saved_as_it_came(tmp_path):
    odd = GENERATION | {"do_sample": False}  # temperature and top_p without sampling, as of Llama 2
    chat_checkpoint(tmp_path / "chat", odd)
    policy, tokenizer = loaded(tmp_path / "chat")
    save_model(policy, tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == odd


def test_files_are_those_that_were_loaded_though_the_checkpoint_is_gone_by_the_end(checkpoint, tmp_path):
    policy, tokenizer = loaded(checkpoint)
    before = (checkpoint / "tokenizer.json").read_bytes()
    for path in checkpoint.iterdir():
        path.unlink()
    export_model(policy, tokenizer, tmp_path / "out", None)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before
    assert set(dtypes(tmp_path / "out").values()) == {torch.bfloat16}


def test_a_broken_generation_config_is_one_line_of_error(checkpoint):
    (checkpoint / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^model\.path: cannot load .*generation_config\.json") as error:
        loaded(checkpoint)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_the_hubs_cache_is_saved_as_one_of_a_folder(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub

    cache, commit = tmp_path / "hub", "0" * 40
    place = cache / "models--somebody--chat"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots").mkdir()
    before = small(checkpoint)
    checkpoint.rename(place / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    policy, tokenizer = loaded("somebody/chat")
    export_model(policy, tokenizer, tmp_path / "out", None)
    assert small(tmp_path / "out") == {name: content for name, content in before.items() if name not in NOT_BROUGHT}
    assert set(dtypes(tmp_path / "out").values()) == {torch.bfloat16}


def test_a_checkpoint_for_a_resume_brings_back_the_very_weights(checkpoint, tmp_path):
    policy, tokenizer = loaded(checkpoint)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.rand_like(parameter) * 1e-3)
    save_model(policy, tokenizer, tmp_path / "out")
    again, _ = loaded(checkpoint)
    reload(again, tmp_path / "out")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in policy.state_dict().items())


@pytest.mark.slow
def test_a_merged_policy_is_saved_in_its_checkpoints_dtype_and_the_base_exactly(
    checkpoint, overrides, compose_run, tmp_path
):
    run(compose_run(*overrides, "model.lora.rank=2", "sft.steps=2"), tmp_path / "run")
    assert dtypes(tmp_path / "run" / "policy") == dtypes(checkpoint)
    assert set(dtypes(tmp_path / "run" / "base").values()) == {torch.float32}, "workers compare its digest"
    files = small(tmp_path / "run" / "policy")
    assert files == {name: content for name, content in small(checkpoint).items() if name not in NOT_BROUGHT}


@pytest.mark.slow
@pytest.mark.parametrize("options", ["model.dtype=bfloat16", "model.dtype=bfloat16 model.save_dtype=float32"])
def test_the_dtype_of_what_is_saved_is_apart_from_that_of_training(
    checkpoint, overrides, compose_run, tmp_path, options
):
    run(compose_run(*overrides, *options.split()), tmp_path / "run")
    wanted = torch.float32 if "save" in options else torch.bfloat16
    assert set(dtypes(tmp_path / "run" / "policy").values()) == {wanted}
