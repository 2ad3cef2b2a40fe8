"""Every check that needs a GPU and a real vLLM, in one go, and a table of what came out.

python tests/gpu/vllm_all.py FOLDER [CHECK ...]     FOLDER keeps logs and runs; a second GPU takes half of the checks

A check runs in a process of its own. Greedy tokens of two sets of weights (fill() of vllm_update.py) must be the same
however they came into whichever server.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from processes import ROOT, Row, memory_used, output, rows_of, series

sys.path.insert(0, str(ROOT))
DEADLINE_S = 420.0  # of one check
SEEDS = (1, 2)  # of the two sets of weights; version v has set 1 if it is odd
KILLS = int(os.environ.get("KILLS", "16"))
CYCLES = 8  # updates after the first, in which a trainer is killed
SHAPE = "qwen2.5-0.5b"
TINY = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4) | dict(
    num_key_value_heads=2, vocab_size=1000, tie_word_embeddings=True
)
GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}  # else it compiles for minutes
ENGINE = {"max_model_len": 512, "gpu_memory_utilization": 0.35} | GRAPHS
TRAIN = (
    *("experiment=smoke", "rollout=vllm", "transfer.take=copy", "model.hidden=256", "model.dtype=bfloat16"),
    *("logger=[jsonl]", "transfer.sender.start_timeout_s=400"),
)


# --- checks: each prints lines, the last of which is its row ----------------------------------------------------------


def updates_05(folder: Path) -> str:
    """Our update inside vLLM beside vLLM's own, of half a billion parameters."""
    return _benchmark(SHAPE, folder)


def updates_7(folder: Path) -> str:
    """The same of seven billion."""
    return _benchmark("qwen2.5-7b", folder)


def stock_server(folder: Path) -> str:
    """`vllm serve` with vLLM's own backend, updated over HTTP by the one-shot sender."""
    from transfer.vllm.stock import StockIpc, StockServer, update

    model = _model()
    with _serving(folder, {"weight_transfer_config": {"backend": "ipc"}}) as url:
        with closing(StockServer(url, 120.0, StockIpc())) as server:
            server.open(dict(model.named_parameters()))
            seconds = []
            for version, seed in enumerate((1, 2, 1, 2), 1):
                _fill(model, seed)
                began = time.perf_counter()
                update([server], model.named_parameters(), version)
                seconds.append(time.perf_counter() - began)
                _same_tokens(folder, seed, _greedy(server.complete))
        return f"dialect {server.dialect}, {1e3 * min(seconds[1:]):.0f} ms an update, tokens agree"


def killed_trainers(folder: Path) -> str:
    """`vllm serve` with our plug-in: trainers die at random moments of an update."""
    with _serving(folder, {}) as url, ExitStack() as stack:
        trainers = []
        for _ in range(KILLS + 1):
            command = [sys.executable, __file__, str(folder), "trainer", url]
            log = stack.enter_context((folder / f"trainer-{len(trainers)}.log").open("w"))
            trainers.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
            )
            stack.callback(trainers[-1].kill)
        tokens = _orderly(trainers[0])
        for seed in SEEDS:
            _same_tokens(folder, seed, tokens[seed])
        found = [_killed(trainer, url, tokens) for trainer in trainers[1:]]
    serving = [label for label in found if label != "refusing"]
    return (
        f"{len(found)} kills: {found.count('refusing')} left it refusing, {len(serving)} serving whole weights "
        f"(set 1 {serving.count('1')}, set 2 {serving.count('2')}), never a mixture"
    )


def tensor_parallel(folder: Path) -> str:
    """Two GPUs hold one model; what replays leave answers as what vLLM's own reloading leaves."""
    from transfer import make_transfer
    from transfer.config import IpcConfig, SenderConfig, Staging, Take, Verify

    model = _model()
    config = IpcConfig(sender=SenderConfig(timeout_s=120.0), staging=Staging.live, take=Take.copy, verify=Verify.digest)
    expected, plan, seconds = {}, "", []
    with make_transfer(config, folder) as session, _worker(folder, dict(session.endpoint), 2) as sender:
        weights = model.state_dict(keep_vars=True)
        for first in SEEDS:
            session.open(weights, [sender])  # agreed anew: the first push is vLLM's own reloading
            _fill(model, first)
            session.push(weights)
            expected[first] = _greedy(sender.completed)
        assert expected[1] != expected[2]
        for seed in (1, 2) * 10:
            _fill(model, seed)
            began = time.perf_counter()
            session.push(weights)
            seconds.append(time.perf_counter() - began)
            assert _greedy(sender.completed) == expected[seed], f"other tokens, weights {seed}"
        plan = sender.call("status", {})["plan"]
    return f"{1e3 * sorted(seconds)[10]:.2f} ms an update; plan: {plan}; tokens agree"


def sleeping(folder: Path) -> str:
    """Runs whose workers sleep while the trainer learns."""
    runs = {level: _train(folder / f"sleep-{level}", f"rollout.sleep_level={level}") for level in (0, 1, 2)}
    rewards = {level: series(rows, "train/reward") for level, rows in runs.items()}
    mismatch = max(max(series(rows, "train/mismatch")) for rows in runs.values())
    transfer = {level: 1e3 * sorted(series(rows, "seconds/transfer"))[1] for level, rows in runs.items()}
    assert mismatch < 0.05, f"log-probs differ by {mismatch}"
    assert rewards[0][0] == rewards[1][0] == rewards[2][0], f"not the same samples at first: {rewards}"
    same = rewards[0] == rewards[1] == rewards[2]
    shown = ", ".join(f"{level}: {ms:.0f} ms" for level, ms in transfer.items())
    return f"mismatch at most {mismatch:.1e}; rewards of all levels {'equal' if same else 'differ'}; transfer {shown}"


def killed_run(folder: Path) -> str:
    """A run whose trainer is killed leaves no process, and nothing on the GPU."""
    before = memory_used(os.environ["CUDA_VISIBLE_DEVICES"])
    run = folder / "killed_run"
    with (folder / "killed_run.log").open("w") as log:
        process = subprocess.Popen(_training(run, "steps=100000"), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + DEADLINE_S
            while len(series(rows_of(run), "train/reward")) < 3:
                assert process.poll() is None and time.monotonic() < deadline, "it did not come to train"
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    began = time.monotonic()
    while (left := memory_used(os.environ["CUDA_VISIBLE_DEVICES"]) - before) > 0 and time.monotonic() < began + 30:
        time.sleep(0.2)
    assert left <= 0, f"{left} MiB of the GPU are still taken"
    return f"{time.monotonic() - began:.1f} s later the GPU is as it was"


def smoke(folder: Path) -> str:
    """experiment=gpu_smoke."""
    command = [sys.executable, "-m", "rlhf.train", "experiment=gpu_smoke", f"hydra.run.dir={folder}/gpu_smoke"]
    output(command, folder / "gpu_smoke.log", DEADLINE_S)
    rows = rows_of(folder / "gpu_smoke")
    summary = json.loads((folder / "gpu_smoke" / "summary.json").read_text())
    assert max(series(rows, "train/mismatch")) < 0.05
    step, tokens = (sorted(series(rows, key))[5] for key in ("seconds/step", "tokens_per_second"))
    shares = {
        name: 1e3 * sorted(series(rows, f"seconds/{name}"))[5] for name in ("sample", "reward", "learn", "transfer")
    }
    return (
        f"{1e3 * step:.0f} ms a step ({', '.join(f'{name} {ms:.1f}' for name, ms in shares.items())}), "
        f"{tokens:.0f} tokens/s, mismatch {max(series(rows, 'train/mismatch')):.1e}, "
        f"{summary['seconds']:.0f} s in all"
    )


CHECKS: dict[str, tuple[int, Callable[[Path], str]]] = {  # the GPU it wants; 2: both
    "updates_05": (0, updates_05),
    "updates_7": (0, updates_7),
    "smoke": (0, smoke),
    "stock_server": (1, stock_server),
    "killed_trainers": (1, killed_trainers),
    "sleeping": (1, sleeping),
    "killed_run": (1, killed_run),
    "tensor_parallel": (2, tensor_parallel),
}


# --- their parts ------------------------------------------------------------------------------------------------------


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from tests.benchmarks.vllm_update import SHAPES

    shape = SHAPES[SHAPE] if _device() == "cuda" else TINY
    config = Qwen2Config(**shape, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None)
    with torch.device(_device()):
        model = AutoModelForCausalLM.from_config(config, dtype=_dtype()).requires_grad_(False)
    model.tie_weights()
    return model


def _dtype() -> Any:
    import torch

    return torch.bfloat16 if _device() == "cuda" else torch.float32


def _fill(model: Any, seed: int) -> None:
    from tests.benchmarks.vllm_update import fill

    fill(model, seed)


def _spec(endpoint: dict[str, Any], engine_args: dict[str, Any]) -> Any:
    from rlhf.rollout.build import architecture_of
    from rlhf.rollout.spec import WorkerSpec

    spec = WorkerSpec(architecture=architecture_of(_model()), endpoint=endpoint, engine="vllm")
    spec.dtype, spec.device = str(_dtype()).removeprefix("torch."), _device()
    own = ENGINE if _device() == "cuda" else {"max_model_len": 512, "enforce_eager": True}
    spec.engine_args, spec.token = {**own, **engine_args}, "check"
    return spec


@contextmanager
def _serving(folder: Path, engine_args: dict[str, Any]) -> Iterator[str]:
    """The address of a `vllm serve`."""
    from transfer.worker.process import WorkerProcess

    os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # which vLLM's own backend needs
    spec = json.dumps(asdict(_spec({}, engine_args)))
    log = folder / f"serve-{len(engine_args)}.log"
    with WorkerProcess("server", "rlhf.rollout.vllm_serve", spec, log) as process:
        yield f"http://127.0.0.1:{process.port(time.monotonic() + DEADLINE_S)}"


@contextmanager
def _worker(folder: Path, endpoint: dict[str, Any], ranks: int) -> Iterator[Any]:
    """Our own worker around vllm.LLM."""
    from transfer.trainer.senders.http import HttpSender
    from transfer.worker.process import WorkerProcess

    spec = _spec(endpoint, {"tensor_parallel_size": ranks})
    with WorkerProcess("worker", "rlhf.rollout.worker", json.dumps(asdict(spec)), folder / "tp.log") as process:
        url = f"http://127.0.0.1:{process.port(time.monotonic() + DEADLINE_S)}"
        with closing(HttpSender(url, spec.token, "worker", 120.0)) as sender:
            yield _Completing(sender)


class _Completing:
    """A sender, and `completed`."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sender, name)

    def completed(self, body: dict[str, Any]) -> Any:
        return self._sender.call("completions", body)


def _greedy(complete: Callable[[dict[str, Any]], Any]) -> list[list[int]]:
    from tests.benchmarks.vllm_update import PROMPTS

    body = {"prompt": PROMPTS, "seeds": [0] * len(PROMPTS), "n": 1, "max_tokens": 16, "temperature": 0.0}
    return [choice["token_ids"] for choice in complete({**body, "stop_token_ids": []})["choices"]]


def _same_tokens(folder: Path, seed: int, tokens: list[list[int]]) -> None:
    """As every other check of this folder has found for these weights."""
    known = folder / f"tokens-{seed}.json"
    try:
        with known.open("x") as file:
            json.dump(tokens, file)
    except FileExistsError:
        expected = json.loads(known.read_text())
        assert tokens == expected, f"weights {seed}: {tokens} here, {expected} elsewhere"


def trainer(url: str) -> None:
    """A trainer of the server, for killed_trainers: `go` pushes until it is killed, `orderly` once for each set."""
    from rlhf.config import VllmRolloutConfig
    from rlhf.rollout.vllm_server import server_at, worker_around
    from transfer import make_transfer
    from transfer.config import IpcConfig, SenderConfig, Staging, Take, Verify
    from transfer.trainer.senders.direct import DirectSender

    model = _model()
    staging = Staging.live if _device() == "cuda" else Staging.arena
    config = IpcConfig(sender=SenderConfig(timeout_s=60.0), staging=staging, take=Take.copy, verify=Verify.digest)
    print("ready", flush=True)
    how = sys.stdin.readline().strip()
    rollout = VllmRolloutConfig(timeout_s=60.0, found_paused=True)
    with make_transfer(config, Path(".")) as session:
        spec = _spec(dict(session.endpoint), {})
        with closing(server_at(url, spec, rollout, None)) as server:
            session.open(model.state_dict(keep_vars=True), [DirectSender(worker_around(server, model, spec), "server")])
            for number in range(2 if how == "orderly" else 10**6):
                _fill(model, seed := SEEDS[number % 2])
                session.push(model.state_dict(keep_vars=True))
                time.sleep(session.last.seconds)  # so that about half of the kills come between two updates
                said = {"seed": seed, "tokens": _greedy(server.complete)} if how == "orderly" else {"seed": seed}
                print(json.dumps(said), flush=True)


def _orderly(child: subprocess.Popen[str]) -> dict[int, Any]:
    """The tokens of each set of weights, in this server."""
    assert child.stdin and child.stdout
    assert child.stdout.readline().strip() == "ready"
    child.stdin.write("orderly\n")
    child.stdin.flush()
    said = [json.loads(child.stdout.readline()) for _ in SEEDS]
    assert child.wait(60) == 0
    tokens = {each["seed"]: each["tokens"] for each in said}
    assert tokens[1] != tokens[2]
    return tokens


def _killed(child: subprocess.Popen[str], url: str, tokens: dict[int, Any]) -> str:
    """Let it push, kill it at some moment, and look at what the server says then: the set, or "refusing"."""
    import requests

    assert child.stdin and child.stdout
    assert child.stdout.readline().strip() == "ready"
    child.stdin.write("go\n")
    child.stdin.flush()
    times = []
    for _ in range(4):
        child.stdout.readline()
        times.append(time.monotonic())
    cycle = (times[-1] - times[0]) / 3
    time.sleep(random.uniform(0, CYCLES * cycle))
    child.kill()
    child.wait()
    from transfer.vllm.stock_completions import complete
    from transfer.vllm.stock_routes import Routes

    if requests.get(f"{url}/is_paused", timeout=10).json()["is_paused"]:
        return "refusing"
    with closing(Routes(url, 30.0, None)) as routes:
        found = _greedy(lambda body: {"choices": complete(routes, body, 30.0)})
    assert found in tokens.values(), f"a mixture: {found}, where whole weights say {tokens}"
    return next(str(seed) for seed, expected in tokens.items() if expected == found)


def _benchmark(shape: str, folder: Path) -> str:
    command = [sys.executable, "-m", "tests.benchmarks.vllm_update", shape]
    printed = output(command, folder / f"updates-{shape}.log", DEADLINE_S)
    lines = [line for line in printed.splitlines() if " x limit" in line or "greedy" in line or "updates:" in line]
    return "\n    ".join(lines)


def _train(folder: Path, *overrides: str) -> list[Row]:
    output(_training(folder, *overrides), folder.with_suffix(".log"), DEADLINE_S)
    return rows_of(folder)


def _training(folder: Path, *overrides: str) -> list[str]:
    memory = "rollout.engine_args={max_model_len: 128, gpu_memory_utilization: 0.3, compilation_config: {mode: 0}}"
    return [sys.executable, "-m", "rlhf.train", *TRAIN, memory, f"hydra.run.dir={folder}", *overrides]


# --- one after the other, on each GPU ---------------------------------------------------------------------------------


def main() -> int:
    """Run all checks, or those named; 1 if one failed."""
    import torch

    folder, wanted = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(CHECKS)
    folder.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count()
    print(f"{torch.cuda.get_device_name() if gpus else 'no GPU'} x {gpus}, torch {torch.__version__}", flush=True)
    with ThreadPoolExecutor(2) as pool:
        alone = [[name for name in wanted if CHECKS[name][0] == gpu] for gpu in (0, 1)]
        if gpus < 2:
            alone = [[*alone[0], *alone[1]]]
        passed = [ok for oks in pool.map(_queue, [folder] * 2, alone, ("0", "1")) for ok in oks]
    passed += _queue(folder, [name for name in wanted if CHECKS[name][0] == 2 and gpus > 1], "0,1")
    return 0 if all(passed) else 1


def _queue(folder: Path, names: list[str], gpus: str) -> list[bool]:
    return [_passes(name, folder, gpus) for name in names]


def _passes(name: str, folder: Path, gpus: str) -> bool:
    began = time.monotonic()
    command = [sys.executable, __file__, str(folder), "check", name]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": path}
    with (folder / f"check-{name}.log").open("w") as log:
        try:
            ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, env=env, text=True, timeout=DEADLINE_S)
            ok, said = ended.returncode == 0, ended.stdout.strip()
        except subprocess.TimeoutExpired:
            ok, said = False, f"not done in {DEADLINE_S:.0f} s"
    if not ok:
        said += (folder / f"check-{name}.log").read_text()[-1500:]
    print(f"{name:<16} {'ok' if ok else 'FAILED':<6} {time.monotonic() - began:4.0f} s  {said}", flush=True)
    return ok


if __name__ == "__main__":
    if sys.argv[2:3] == ["trainer"]:
        trainer(sys.argv[3])
    elif sys.argv[2:3] == ["check"]:
        print(CHECKS[sys.argv[3]][1](Path(sys.argv[1])))
    else:
        sys.exit(main())
