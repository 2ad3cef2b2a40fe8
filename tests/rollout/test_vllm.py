"""Runs with a real vLLM: in the environment whose Python RLHF_VLLM_PYTHON names (.ci/run makes one, without a GPU)."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from chat_checkpoint import chat_checkpoint, write_conversations
from living import living_in

from rlhf.config import Cut
from rlhf.rollout.hf import left
from transfer.worker.process import python_path

PYTHON = os.environ.get("RLHF_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="RLHF_VLLM_PYTHON names no Python that has vLLM"),
]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
DEADLINE_S = 400.0
TRAIN = (
    *("experiment=smoke", "rollout=vllm", "transfer.take=copy", "model.hidden=64", "logger=[jsonl]"),
    *("rollout.engine_args={max_model_len: 128, enforce_eager: true}", "transfer.sender.start_timeout_s=300"),
)
LEARNS = (
    "sft.steps=60",
    "optim.lr=3e-3",
    "prompts_per_step=16",
    "samples_per_prompt=8",
    "steps=20",
    "evaluate_every=20",
)


def environment():
    return os.environ | ENVIRONMENT | {"PYTHONPATH": python_path()}


def started(folder, *overrides):
    command = [PYTHON, "-m", "rlhf.train", *TRAIN, f"hydra.run.dir={folder}", *overrides]
    with folder.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=folder.parent)


def trained(folder, *overrides):
    """The metrics of one run."""
    with started(folder, *overrides) as process:
        assert process.wait(DEADLINE_S) == 0, folder.with_suffix(".log").read_text()[-3000:]
    return rows_of(folder)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(rows):
    skipped = ("seconds/", "transfer/", "tokens_per")
    return [{key: value for key, value in row.items() if not key.startswith(skipped)} for row in rows]


def series(rows, key):
    return [row[key] for row in rows if key in row]


def check_run(rows):
    """Every step was sampled with the weights of the step before, and vLLM computes what the trainer does."""
    assert series(rows, "rollout/version") == [float(step) for step in range(len(series(rows, "train/reward")))]
    assert max(series(rows, "train/mismatch")) < 1e-5
    rewards = series(rows, "train/reward")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.05, f"rewards do not rise: {rewards}"


def test_vllm_learns_over_http_and_by_ray_from_two_ranks_with_the_same_numbers_and_survives_a_kill(tmp_path):
    by_http, by_ray = tmp_path / "http", tmp_path / "ray"
    process = started(by_http, *LEARNS)
    try:
        kill_worker_of(process, by_http)
        assert process.wait(DEADLINE_S) == 0, by_http.with_suffix(".log").read_text()[-3000:]
    finally:
        process.kill()
    rows = rows_of(by_http)
    check_run(rows)
    assert sum(series(rows, "transfer/restarts")) >= 0
    journal = (by_http / "journal" / "worker-0.jsonl").read_text().splitlines()
    boots = {json.loads(line)["boot"] for line in journal}
    assert len(boots) == 2, "the worker was killed, started again, and brought to the newest version"
    shards = ("trainer=sharded", "trainer.ranks=2")
    assert numbers(trained(by_ray, *LEARNS, "transfer/sender=ray", *shards)) == numbers(rows)


def kill_worker_of(trainer, folder):
    """kill -9 the worker once it has served a few versions."""
    journal = folder / "journal" / "worker-0.jsonl"
    deadline = time.monotonic() + DEADLINE_S
    while not (journal.exists() and journal.read_text().count('"finish"') >= 4):
        assert time.monotonic() < deadline and trainer.poll() is None, folder.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.1)
    children = subprocess.run(
        ["pgrep", "-P", str(trainer.pid), "-f", "rlhf.rollout.worker"], capture_output=True, text=True
    )
    (worker,) = map(int, children.stdout.split())
    os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("serve", ["false", "true"])
def test_vllm_stops_at_any_stop_id_of_a_checkpoint(tmp_path, serve):
    model, data = chat_checkpoint(tmp_path / "chat", hidden=64), write_conversations(tmp_path / "talk.jsonl")
    talk = ("model=hf", f"model.path={model}", "task=jsonl", f"task.path={data}", "task.held_out=8", "sft.steps=0")
    overrides = [override for override in TRAIN if not override.startswith(("model", "rollout.engine_args"))]
    engine = "rollout.engine_args={max_model_len: 64, enforce_eager: true, gpu_memory_utilization: 0.2}"
    command = [PYTHON, "-m", "rlhf.train", *overrides, *talk, engine, f"rollout.serve={serve}", "steps=1"]
    log = tmp_path / "log"
    with log.open("w") as file:
        told = [*command, f"hydra.run.dir={tmp_path / 'run'}"]
        assert subprocess.run(told, stdout=file, stderr=file, env=environment(), timeout=DEADLINE_S).returncode == 0
    assert series(rows_of(tmp_path / "run"), "train/truncated") == [0.0], log.read_text()[-3000:]


def test_vllm_serve_is_started_trained_through_its_own_routes_and_ended(tmp_path):
    folder = tmp_path / "served"
    rows = trained(folder, *LEARNS, "rollout.serve=true")
    check_run(rows)
    assert living_in(tmp_path) == [], "nothing of the server is left"
    log = (folder / "worker-0.log").read_text()
    assert "POST /update_weights" in log and "POST /finish_weight_update" in log


@pytest.mark.lag(2)
def test_vllm_samples_ahead_from_a_queue_and_rows_go_on_under_new_weights(tmp_path):
    ahead = (
        "rollout.ahead.lag=2",
        "rollout.ahead.order=free",
        "algo.correction=tis",
        "rollout.kv_after_update=recompute",
    )
    small = ("sft.steps=20", "prompts_per_step=16", "samples_per_prompt=4", "steps=8", "evaluate_every=4")
    rows = trained(tmp_path / "run", *small, *ahead, "rollout.in_flight=keep", "rollout.max_new_tokens=32")
    assert len(series(rows, "train/loss")) == 8
    assert max(series(rows, "rollout/lag")) > 0 and max(series(rows, "rollout/lag_max")) <= 2
    journal = (tmp_path / "run/journal/trainer.jsonl").read_text().splitlines()
    learned = [seed for line in journal if '"consume"' in line for seed in json.loads(line)["seeds"]]
    assert len(learned) == len(set(learned)) == 8 * 16


CUT = """
import json, math, os, sys
from transformers import Qwen3Config
from rlhf.config import Cut
from rlhf.rollout import vllm
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.spec import WorkerSpec

shape = Qwen3Config(vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=64, eos_token_id=1, pad_token_id=0)
args = {"max_model_len": 64, "enforce_eager": True}
spec = WorkerSpec(architecture=shape.to_dict() | {"architectures": ["Qwen3ForCausalLM"]},
    endpoint={"backend": "local"}, engine="vllm", engine_args=args)
for name, value in vllm.environment(spec).items():
    os.environ.setdefault(name, value)
llm = vllm._llm(vllm._imported(), spec)

def spread(model):  # the weights mean nothing, and all tokens would be as likely
    dict(model.named_parameters())["model.norm.weight"].data.fill_(300.0)

llm.apply_model(spread)
engine = vllm.VllmEngine(llm)

def first(cut):
    sampling = Sampling(n=2048, max_tokens=1, temperature=1.3, stop_ids=(), steady=True, cut=Cut(**cut))
    samples = engine.generate([[3, 4]], [5], sampling, lambda: 1)
    return {sample.ids[0]: sample.logprobs[0] for sample in samples}

cuts = [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 6, "top_p": 0.6}, {"min_p": 0.3, "top_p": 0.6}]
json.dump([[cut, first(cut)] for cut in cuts], open(sys.argv[1], "w"))
"""


def test_vllm_cuts_as_engine_hf_does_and_its_log_probs_are_of_what_is_left(tmp_path):
    (tmp_path / "cut.py").write_text(CUT)
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [PYTHON, str(tmp_path / "cut.py"), str(tmp_path / "told.json")]
        done = subprocess.run(command, stdout=file, stderr=file, env=environment(), timeout=DEADLINE_S, cwd=tmp_path)
    assert done.returncode == 0, log.read_text()[-3000:]
    (_, drawn), *told = json.loads((tmp_path / "told.json").read_text())
    assert len(drawn) > 12 and max(drawn.values()) > min(drawn.values()) + 1, "nearly all was drawn, and is not flat"
    logits = torch.tensor([[drawn.get(str(token), -9.0) for token in range(16)]])  # the others are seldom
    for cut, seen in told:
        expected = left(logits, Cut(**cut)).log_softmax(-1)[0]
        kept = {str(token): logprob.item() for token, logprob in enumerate(expected) if not logprob.isinf()}
        assert seen == pytest.approx({token: kept[token] for token in seen}, abs=1e-4)
        assert len(kept) < len(drawn) and seen.keys() == kept.keys()
