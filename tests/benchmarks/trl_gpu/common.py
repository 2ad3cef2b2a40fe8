"""What every part of the comparison prints, counts and measures in the same way."""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[3]
MARK = "RESULT "  # in front of a measurement in a part's log
PEAK = 790e12  # bfloat16 FLOP/s of dense products, measured on an H200
GIB = 2**30
WARM = 1  # first steps of a run that do not count

PLAIN, LOGPROBS = "limit: vLLM alone", "limit: vLLM alone, log-probs as objects"  # names of rows
LEARNING = "limit: packed rows, compiled layers"
BOTH = "limit: both together"
TUNED, LIGER, DEFAULTS = "TRL, best tuning", "TRL, best tuning, Liger's layers", "TRL, its defaults"
OURS = "ours, its defaults"

Row = dict[str, Any]


class Architecture(Protocol):
    """What the number of operations depends on."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Between 0 and 1 by a hash of the answer: nearly every group has a signal, and it costs nothing."""
    return [zlib.crc32(text.encode()) % 1000 / 1000 for text in completions]


def say(row: str, **numbers: Any) -> None:
    """Print one measurement, which `results` reads again."""
    rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in numbers.items()}
    print(MARK + json.dumps({"row": row, **rounded}), flush=True)


def results(log: Path) -> list[Row]:
    """The measurements in a part's log; none where there is no log."""
    if not log.exists():
        return []
    lines = log.read_text(errors="replace").splitlines()
    return [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK) and line.endswith("}")]


def work_of(prompts_B: Sequence[Sequence[int]], tokens: int) -> Row:
    """What one step has worked on: rows, sampled and prompt tokens, and a digest of the prompts in any order."""
    ids = json.dumps(sorted(list(prompt) for prompt in prompts_B))
    return {
        "rows": len(prompts_B),
        "tokens": tokens,
        "prompt_tokens": sum(map(len, prompts_B)),
        "prompts": hashlib.sha256(ids.encode()).hexdigest(),
    }


def counted(values: Sequence[float]) -> list[float]:
    """The steps that count: all but the first, unless there is no other."""
    return list(values[WARM:] or values)


def median(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(values) if values else None


def flops(shape: Architecture, prompt_tokens: int, new: int, rows: int) -> float:
    """Operations of the model, forward and backward, on rows of prompt and answer (formula in docs/benchmarks.md)."""
    head = shape.hidden // shape.heads
    tokens, sampled = prompt_tokens + rows * new, rows * new
    attention_weights = shape.hidden * head * 2 * (shape.heads + shape.kv_heads)
    weights = shape.layers * (attention_weights + 3 * shape.hidden * shape.intermediate)
    mean_context = tokens / rows / 2
    attention = 12 * shape.layers * shape.heads * head * mean_context * tokens
    return 6 * weights * tokens + attention + 6 * shape.hidden * shape.vocabulary * sampled


def utilisation(shape: Architecture, work: Row, seconds: float | None, peak: float) -> float | None:
    """MFU: the operations of a step's rows, as a share of what the card could do in these seconds."""
    if not seconds:
        return None
    return flops(shape, work["prompt_tokens"], work["tokens"] // work["rows"], work["rows"]) / seconds / peak


class GpuMemory:
    """The most memory of the first GPU that all processes together have in use, GiB; None without a GPU."""

    QUERY = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0", "--loop-ms=200")

    def __enter__(self) -> GpuMemory:
        self.peak: float | None = None
        try:
            self._process = subprocess.Popen(self.QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except FileNotFoundError:
            return self
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_process"):
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip().isdigit():
                self.peak = max(self.peak or 0.0, int(line) / 1024)


def device() -> str:
    """Where models live."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronise() -> None:
    """Wait until the GPU, if there is one, has done what it was told."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def most_allocated() -> float | None:
    """The most GPU memory that this process's tensors have taken, GiB; None without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None
