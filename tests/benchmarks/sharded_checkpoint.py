"""Saving and loading a sharded model's weights and moments: files by rank beside torch's distributed checkpoint (DCP).

    python -m tests.benchmarks.sharded_checkpoint [--ranks 2] [--rounds 5]

Both flush what they write; ours reads it once more for its sha256, which DCP has not. A table of medians is printed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ranks"))
from forked_ranks import pool

from rlhf.checkpoint.shards import stored, write_rows
from rlhf.checkpoint.state import optimizer_tensors, weights_of
from rlhf.checkpoint.store import flushed
from rlhf.learning.spread import Sharded
from rlhf.ranks.ranks import Ranks

FILES = ("policy", "policy-optimizer")


def made(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Weights and moments of a model of 8 million parameters, after a step."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = AutoConfig.for_model(
        "qwen3",
        vocab_size=8191,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Sharded(ranks, torch.device("cpu")).lay(AutoModelForCausalLM.from_config(shape).eval())
    optimizer = torch.optim.AdamW([(n, p) for n, p in model.named_parameters()], lr=1e-3, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"policy": weights_of(model), "policy-optimizer": optimizer_tensors(model, optimizer)}


def save(ranks: Ranks, tensors: dict[str, dict[str, Any]], folder: Path) -> None:
    flushed([write_rows(folder, name, held, ranks.number, ranks.count) for name, held in tensors.items()])


def load(ranks: Ranks, tensors: dict[str, dict[str, Any]], folder: Path) -> None:
    for name, held in tensors.items():
        with stored(folder, name) as saved, torch.no_grad():
            for key, tensor in held.items():
                saved[key].read_into(tensor)


def flat(tensors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{name}/{key}": tensor for name, held in tensors.items() for key, tensor in held.items()}


def median(call: Callable[[], object], rounds: int) -> float:
    """Seconds until all ranks have done it."""
    taken = []
    for _ in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        call()
        dist.barrier()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def _measured(ranks: Ranks, folder: Path, rounds: int) -> tuple[dict[str, float], int]:
    tensors = made(ranks)
    ours, theirs = folder / "ours", folder / "dcp"
    ours.mkdir(exist_ok=True)
    seconds = {
        "save": median(lambda: save(ranks, tensors, ours), rounds),
        "save, DCP": median(lambda: dcp.save(flat(tensors), checkpoint_id=theirs), rounds),
        "load": median(lambda: load(ranks, tensors, ours), rounds),
        "load, DCP": median(lambda: dcp.load(flat(tensors), checkpoint_id=theirs), rounds),
    }
    return seconds, sum(tensor.numel() * tensor.element_size() for tensor in flat(tensors).values())


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        with pool(options.ranks) as ranks:
            seconds, nbytes = ranks.call(_measured, folder, options.rounds)[0]
    finally:
        shutil.rmtree(folder)
    print(f"{options.ranks} ranks, {nbytes / 1e6:.0f} MB of weights and moments, medians of {options.rounds}")
    for what in ("save", "load"):
        one, other = seconds[what], seconds[f"{what}, DCP"]
        print(f"{what}: {one * 1e3:.0f} ms, DCP {other * 1e3:.0f} ms: {other / one:.1f} times as long")


if __name__ == "__main__":
    main()
