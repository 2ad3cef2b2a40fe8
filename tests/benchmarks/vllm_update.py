"""What an update of the weights inside vLLM takes: our way and vLLM's own `ipc` engine, in one worker, one run.

python -m tests.benchmarks.vllm_update [SHAPE ...]      qwen2.5-0.5b qwen2.5-7b; needs a GPU and vLLM 0.24

The worker is the one of rollout=vllm, behind HTTP; vLLM's engine is driven in it by the one-shot sender, its messages
over the same HTTP. Both ways load two sets of weights; greedy tokens must be the same after either. The limit is one
device copy of the same bytes.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rlhf.rollout.spec import WorkerSpec
from transfer import IPCWeightTransferEngine, make_transfer
from transfer.agreement import wire
from transfer.config import IpcConfig, SenderConfig, Staging, Take, Verify
from transfer.trainer.senders.http import HttpSender
from transfer.worker.process import WorkerProcess

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14)
    | dict(num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2.5-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    | dict(num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
}
ROUNDS = 10
MANY = 200  # updates, over which memory must stay as it is
PROMPTS = [[11, 12, 13, 14], [500, 600, 700], [9] * 12, list(range(100, 130))]
WORKER = "tests.benchmarks.vllm_worker"


def main(shapes: list[str]) -> None:
    """Print a table for each shape."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # which vLLM's own way needs
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; medians of {ROUNDS}, milliseconds, HTTP included"
    )
    for shape in shapes or list(SHAPES):
        with tempfile.TemporaryDirectory() as folder:
            compare(shape, Path(folder))


def compare(shape: str, folder: Path) -> None:
    """Both ways into one worker that holds a model of this shape."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=4096, bos_token_id=None, eos_token_id=None)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    model.tie_weights()
    transfer_config = IpcConfig(
        sender=SenderConfig(timeout_s=120.0), staging=Staging.live, take=Take.copy, verify=Verify.digest
    )
    engine_args = dict(max_model_len=512, gpu_memory_utilization=0.35, weight_transfer_config={"backend": "ipc"})
    engine_args["compilation_config"] = {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
    }  # else it compiles for minutes
    with ExitStack() as stack:
        session = stack.enter_context(make_transfer(transfer_config, folder))
        architecture = json.loads(config.to_json_string(use_diff=False))
        spec = WorkerSpec(
            architecture=architecture, endpoint=dict(session.endpoint), dtype="bfloat16", device="cuda", engine="vllm"
        )
        spec.engine_args, spec.token = engine_args, "bench"
        log = Path(os.environ.get("OUT", str(folder))) / f"vllm-{shape}.log"
        process = stack.enter_context(WorkerProcess("worker", WORKER, json.dumps(asdict(spec)), log))
        os.environ[wire.TOKEN_VARIABLE] = spec.token
        url = f"http://127.0.0.1:{process.port(time.monotonic() + 300)}"
        sender = stack.enter_context(closing(HttpSender(url, spec.token, "worker", 120.0)))
        rows = {"one device copy: the limit": timed(copying(model))}
        torch.cuda.empty_cache()
        rows["vLLM's own ipc engine"] = timed(one_shot(model, url))
        tokens = {}
        for seed in (1, 2):
            fill(model, seed)
            one_shot(model, url)()
            tokens[seed] = greedy(sender)
        rows |= our_way(model, session, sender, tokens)
        show(shape, model, rows, sender.call("status", {})["plan"])


def our_way(model: torch.nn.Module, session: Any, sender: Any, expected: Mapping[int, Any]) -> dict[str, list[float]]:
    """A session whose worker copies the trainer's own parameters; checks tokens, and that memory stays as it is."""
    torch.cuda.empty_cache()  # of the limit's buffers
    session.open(model.state_dict(keep_vars=True), [sender])
    weights = model.state_dict(keep_vars=True)
    began = time.perf_counter()
    session.push(weights)
    first = time.perf_counter() - began
    for seed in (1, 2, 1):
        fill(model, seed)
        session.push(weights)
        assert greedy(sender) == expected[seed], f"other greedy tokens than after vLLM's own update (weights {seed})"
    print(
        f"greedy tokens after our updates are those after vLLM's own, for two sets of weights: {expected[1][0][:6]} ..."
    )
    rows = {"ours, the first (through vLLM's own loader, then recorded)": [first]}
    for verify in (True, False):
        session.with_digest = verify
        name = f"ours, verify={'digest' if verify else 'off'}"
        rows[name] = timed(lambda: session.push(weights))
        rows[f"{name}: the trainer's look"] = [session.last.write_seconds]
    before = used()
    for _ in range(MANY):
        session.push(weights)
    print(f"{MANY} updates: GPU memory {(used() - before) / 2**20:+.1f} MiB")
    return rows


def one_shot(model: torch.nn.Module, url: str) -> Callable[[], Any]:
    """vLLM's own update, by handles of all tensors, made anew."""
    args = {"mode": "http", "url": url}
    return lambda: IPCWeightTransferEngine.trainer_send_weights(model.named_parameters(), args)


def copying(model: torch.nn.Module) -> Callable[[], Any]:
    """One device copy of as many bytes."""
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    source = torch.ones(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    return lambda: target.copy_(source)


def timed(way: Callable[[], Any]) -> list[float]:
    """Seconds of each of ROUNDS, after two that do not count."""
    seconds = []
    for _ in range(2 + ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        way()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int) -> None:
    """Weights that depend on the seed alone."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)


def greedy(sender: Any) -> list[list[int]]:
    """What the worker says to the prompts."""
    body = {"prompt": PROMPTS, "max_tokens": 16, "temperature": 0.0, "stop_token_ids": [], "seed": 0}
    return [choice["token_ids"] for choice in sender.call("completions", body)["choices"]]


def used() -> int:
    """Bytes that all processes hold of the GPU."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def show(shape: str, model: torch.nn.Module, rows: Mapping[str, list[float]], plan: str) -> None:
    """The table of one shape."""
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    limit = statistics.median(next(iter(rows.values())))
    own = statistics.median(rows["vLLM's own ipc engine"])
    print(f"\n{shape}: {nbytes / 1e9:.2f} GB, {len(list(model.parameters()))} parameters; plan: {plan}")
    for name, seconds in rows.items():
        median = statistics.median(seconds)
        times = f"{median / limit:7.2f} x limit  {own / median:6.1f} x faster than vLLM's own"
        print(
            f"{name:<62} {1e3 * median:9.2f}  ({1e3 * min(seconds):.2f} .. {1e3 * max(seconds):.2f}) {times}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
