"""Every check that needs a GPU, in one go, and a table of what came out.

python tests/gpu/run_all.py [FOLDER [CHECK ...]]     FOLDER keeps the runs with their logs; without it they are removed
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from processes import ROOT, Row, memory_used, output, rows_of, series
from trusted import a_check_tells_what_a_run_takes, a_step_is_traced, killed_runs_go_on

DEADLINE_S = 400.0  # of one run, and of the tests
BACKENDS = {
    "local": ("transfer=local",),
    "disk": ("transfer=disk",),
    "view": ("transfer=ipc", "transfer.take=view"),
    "copy": ("transfer=ipc", "transfer.take=copy", "transfer.verify=full"),
    "live": ("transfer=ipc", "transfer.staging=live", "transfer.take=copy"),
    "live view": ("transfer=ipc", "transfer.staging=live", "transfer.take=view"),
    "gloo": ("transfer=gloo",),
}
HALF_BILLION = (  # parameters, of Qwen3's shape
    *("model.layers=30", "model.hidden=1024", "model.heads=16", "model.intermediate=4096", "model.dtype=bfloat16"),
    *("threads=8", "task.held_out=16", "sft.steps=2", "sft.lr=1e-4", "optim.lr=1e-5", "steps=3", "experiment=smoke"),
)
PUSHES = 100
FLAT = "thousand_updates"  # in the name of a test that nothing else on the GPU may disturb
MIB = 2**20


def tests(folder: Path) -> str:
    """The tests that are marked gpu, several at a time if pytest-xdist is there."""
    return _pytest(folder / "tests.log", "-k", f"not {FLAT}", *(("-n", "6") if find_spec("xdist") else ()))


def memory_tests(folder: Path) -> str:
    """Those of them that look at how much memory is free."""
    return _pytest(folder / "memory_tests.log", "-k", FLAT)


def _pytest(log: Path, *options: str) -> str:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--ignore", "tests/fuzz"]
    return output([*command, "-rf", "--tb=short", "--durations=5", *options, "tests"], log, DEADLINE_S).splitlines()[-1]


def small_runs_agree(folder: Path) -> str:
    """`experiment=smoke` with every backend, and heads as wide as large models have them."""
    return _compared(folder, "experiment=smoke", "model.hidden=128")


def default_runs_agree(folder: Path) -> str:
    """The default run with every backend."""
    return _compared(folder)


def workers_in_bfloat16(folder: Path) -> str:
    """An fp32 policy is cast on its way to the worker, whose log-probs then differ a little from the learner's."""
    rows = _train(folder / "bfloat16", "experiment=smoke", "rollout.dtype=bfloat16")
    mismatch = max(series(rows, "train/mismatch"))
    assert 1e-5 < mismatch < 0.05, f"mean difference of log-probs: {mismatch}"
    return f"log-probs differ by {mismatch:.1e} nats on average"


def half_a_billion_parameters(folder: Path) -> str:
    """A large model, trained for a few steps."""
    rows = _train(folder / "half_billion", *HALF_BILLION)
    (nbytes,) = set(series(rows, "transfer/bytes"))
    assert max(series(rows, "train/mismatch")) < 0.05
    push_ms, step_ms = (1e3 * statistics.median(series(rows, f"seconds/{phase}")) for phase in ("transfer", "step"))
    return f"{nbytes / 1e9:.2f} GB in {push_ms:.1f} ms of a step's {step_ms:.0f} ms"


def memory_stays_flat(folder: Path) -> str:
    """Many pushes of the large model to a worker process, with both ways to take them."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # CUDA stays out of this process
        return "; ".join(pool.submit(_pushes, folder, take).result(DEADLINE_S) for take in ("view", "copy"))


def a_check_tells_the_memory(folder: Path) -> str:
    """Of the large model."""
    return a_check_tells_what_a_run_takes(folder, *HALF_BILLION)


QUIET = (memory_stays_flat, half_a_billion_parameters, memory_tests)  # these are timed: nothing else runs meanwhile
BUSY = (
    *(tests, small_runs_agree, workers_in_bfloat16, default_runs_agree),
    *(killed_runs_go_on, a_step_is_traced, a_check_tells_the_memory),
)  # two at a time


def main() -> int:
    """Run all checks; 1 if one failed."""
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device")
        return 0
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        before = memory_used("0")
        wanted = set(sys.argv[2:]) or {check.__name__ for check in (*QUIET, *BUSY)}
        quiet, busy = ([check for check in checks if check.__name__ in wanted] for checks in (QUIET, BUSY))
        passed = [_passes(check, folder) for check in quiet]
        with ThreadPoolExecutor(2) as pool:
            passed += pool.map(lambda check: _passes(check, folder), busy)
        passed.append(_passes(lambda _: _nothing_is_left(before), folder, "nothing is left"))
    return 0 if all(passed) else 1


def _passes(check: Callable[[Path], str], folder: Path, name: str = "") -> bool:
    """Whether a check passes; prints its row of the table."""
    name = name or check.__name__.replace("_", " ")
    began = time.monotonic()
    try:
        said, outcome = check(folder), "ok"
    except Exception as error:
        said, outcome = f"{type(error).__name__}: {error}", "FAILED"
    print(f"{name:<26} {outcome:<6} {time.monotonic() - began:4.0f} s  {said}", flush=True)
    return outcome == "ok"


def _compared(folder: Path, *overrides: str) -> str:
    names = {backend: f"{backend}-{len(overrides)}" for backend in BACKENDS}
    with ThreadPoolExecutor(len(BACKENDS)) as pool:
        runs = list(pool.map(lambda item: _train(folder / names[item[0]], *overrides, *item[1]), BACKENDS.items()))
    reference = [_numbers(row) for row in runs[0]]
    worst = {}
    for backend, rows in zip(BACKENDS, runs, strict=True):
        pairs = list(zip(map(_numbers, rows), reference, strict=True))
        assert all(row.keys() == expected.keys() for row, expected in pairs)
        worst[backend] = max(abs(row[key] - expected[key]) for row, expected in pairs for key in row)
    mismatch = max(max(series(rows, "train/mismatch")) for rows in runs)
    assert not any(worst.values()), f"metrics differ from those of transfer=local by {worst}, mismatch {mismatch:.1e}"
    return f"the same metrics with {', '.join(BACKENDS)}; mismatch at most {mismatch:.1e}"


def _numbers(row: Row) -> Row:
    """What does not depend on the clock or on the backend."""
    return {key: value for key, value in row.items() if not key.startswith(("seconds/", "transfer/", "tokens_per_"))}


def _train(folder: Path, *overrides: str) -> list[Row]:
    """The metrics of one run, a process of its own."""
    command = [sys.executable, "-m", "rlhf.train", f"hydra.run.dir={folder}", "logger=[jsonl]", *overrides]
    output(command, folder.with_suffix(".log"), DEADLINE_S)
    return rows_of(folder)


def _pushes(folder: Path, take: str) -> str:
    from hydra import compose, initialize_config_dir

    from rlhf.compose import CONF, checked, register
    from rlhf.models.policy import make_policy
    from rlhf.models.tokenizer import make_tokenizer
    from rlhf.rollout.launch import Workers
    from rlhf.rollout.spec_of_run import worker_spec
    from transfer import make_transfer

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = checked(compose("config", [*HALF_BILLION, "transfer=ipc", f"transfer.take={take}"]))
    torch.set_num_threads(config.threads)
    policy = make_policy(config.model, make_tokenizer(config.model, "abcdef=", False), config.seed)
    weights = policy.state_dict()
    limit_ms = _copy_ms(weights)

    def session(pushes: int) -> tuple[int, list[float], list[float]]:
        with (
            make_transfer(config.transfer, folder) as transfer,
            Workers(worker_spec(policy, config, transfer.endpoint), config, folder, policy) as workers,
        ):
            transfer.open(weights, workers.senders())
            for _ in range(5):
                transfer.push(weights)
            held, seconds, writing = _device_bytes(), [], []
            for _ in range(pushes):
                transfer.push(weights)
                seconds.append(transfer.last.seconds)
                writing.append(transfer.last.write_seconds)
            return _device_bytes() - held, seconds, writing

    session(0)  # what CUDA loads at its first use stays loaded
    before = _device_bytes()
    grown, seconds, writing = session(PUSHES)
    assert grown <= 0, f"{PUSHES} pushes took {grown / MIB:.1f} MiB of the GPU"
    left = _waited_for(lambda: _device_bytes() - before)
    assert left <= 0, f"{left / MIB:.1f} MiB of the GPU are still taken after close"
    push_ms, write_ms = (1e3 * statistics.median(times) for times in (seconds, writing))
    return f"{take}: {push_ms:.1f} ms a push, {write_ms:.1f} of them writing (plain copy {limit_ms:.1f} ms)"


def _waited_for(left: Callable[[], int]) -> int:
    """What is left, once it is nothing, or after a while: the driver takes a moment to clean up after a process."""
    deadline = time.monotonic() + 20
    while (found := left()) > 0 and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def _copy_ms(weights: dict[str, torch.Tensor]) -> float:
    """One device-to-device copy of as many bytes, milliseconds."""
    source = torch.zeros(sum(w.nbytes for w in weights.values()), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def _device_bytes() -> int:
    """What all processes together hold of the GPU, bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def _nothing_is_left(before: int) -> str:
    running = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not any("rlhf.rollout.worker" in (command or ()) for command in running), f"a worker still runs: {running}"
    left = _waited_for(lambda: memory_used("0") - before)
    assert left <= 0, f"{left} MiB of the GPU are still taken"
    return f"GPU memory {before + left} MiB as before, no worker process"


if __name__ == "__main__":
    sys.exit(main())
