"""The folder that vLLM is shown: at the same path for the same model, whole, this user's own, or a temporary one."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.vllm import environment
from rlhf.rollout.vllm_model import model_folder

QWEN = {"architecture": {"model_type": "qwen3", "hidden_size": 64}, "endpoint": {"backend": "local"}}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rlhf" / "vllm-models"


def shown(spec):
    with model_folder(spec) as folder:
        return Path(folder), json.loads((Path(folder) / "config.json").read_text())


def test_the_same_model_is_at_the_same_path_and_another_at_another(home):
    spec = WorkerSpec(**QWEN)
    path, config = shown(spec)
    assert path.parent == home and config == QWEN["architecture"] | {"architectures": ["Qwen3ForCausalLM"]}
    assert (path / "tokenizer.json").exists()
    assert shown(spec)[0] == path
    other = shown(WorkerSpec(**QWEN | {"architecture": {"model_type": "llama"}}))[0]
    assert other.parent == home and other != path
    assert {each.name for each in home.iterdir()} == {path.name, other.name}, "nothing is left aside"
    assert {each.stat().st_mode & 0o777 for each in (home, path, other)} == {0o700}


def test_workers_that_start_together_show_the_same_folder(home):
    with ThreadPoolExecutor(8) as pool:
        paths = {path for path, _ in pool.map(shown, [WorkerSpec(**QWEN)] * 16)}
    assert len(paths) == 1 and list(home.iterdir()) == list(paths)


def test_a_folder_with_other_content_is_not_used(home):
    spec = WorkerSpec(**QWEN)
    path, config = shown(spec)
    (path / "extra.py").write_text("")
    again, same = shown(spec)
    assert again.parent != home and same == config


def test_a_cache_that_cannot_be_written_is_done_without(home):
    home.parent.parent.mkdir()
    home.parent.write_text("a file where a folder should be")
    path, config = shown(WorkerSpec(**QWEN))
    assert config["architectures"] == ["Qwen3ForCausalLM"] and not path.exists(), "a temporary one, which is gone"


def test_without_a_cache_of_its_own_it_is_the_users(home, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shown(WorkerSpec(**QWEN))[0].parent == tmp_path / ".cache" / "rlhf" / "vllm-models"


@pytest.mark.parametrize(
    ("device", "model_type", "forced"), [("cuda", "qwen2", True), ("cuda", "qwen3", False), ("cpu", "qwen2", False)]
)
def test_on_a_gpu_seeds_are_drawn_by_the_model_runner_that_does_it_in_one_kernel(device, model_type, forced):
    spec = WorkerSpec(architecture={"model_type": model_type}, endpoint={}, device=device)
    assert ("VLLM_USE_V2_MODEL_RUNNER" in environment(spec)) == forced
