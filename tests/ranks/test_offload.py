"""trainer.offload: shards, gradients and moments are in the host's memory, and what is computed is what it was."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked_ranks import pool
from safetensors.torch import load_file
from test_learner import sampled
from test_ranks_learner import ALGOS, assert_the_same, learner_of, steps
from torch.distributed.fsdp import CPUOffloadPolicy

from rlhf.learning.by_layer import ByLayer
from rlhf.learning.passes import PADDED, Packed
from rlhf.learning.spread import Sharded
from rlhf.models.device import device_of
from rlhf.ranks.ranks import ALONE, Ranks
from transfer.agreement.dtensor import full, is_dtensor, local_part
from transfer.agreement.manifest import Manifest
from transfer.backends.shards import Shards

CLOSE = 1e-5  # AdamW of a CPU and of a GPU round in their own ways


def _steps(ranks: Ranks, words: str, gather: str) -> list[Any]:
    """With FSDP's own offloading on a CPU, where nothing has to move."""
    spread = (ByLayer if gather == "layer" else Sharded)(ranks, torch.device("cpu"))
    spread._offload = CPUOffloadPolicy(pin_memory=False)
    return steps(learner_of(words, ranks, spread, PADDED.in_lockstep()), 4, [sampled(0), sampled(1)])


@pytest.mark.slow
@pytest.mark.parametrize("words", [ALGOS[1], ALGOS[6]], ids=["ppo", "bfloat16"])
def test_what_fsdp_offloads_is_computed_as_if_it_were_not(words):
    with pool(2) as two:
        for gather in ("step", "layer"):
            plain = two.call(_plain_steps, words, gather)[0]
            for each in two.call(_steps, words, gather):
                assert_the_same(each, plain)


def _plain_steps(ranks: Ranks, words: str, gather: str) -> list[Any]:
    spread = (ByLayer if gather == "layer" else Sharded)(ranks, torch.device("cpu"), offload=True)
    return steps(learner_of(words, ranks, spread, PADDED.in_lockstep()), 4, [sampled(0), sampled(1)])


def held(folder: str, device: str, gather: str, offload: bool, words: str) -> dict[str, Any]:
    """What two steps of a group of one rank tell, where it has what, and the rows that it sends, in its process."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
    )
    kind, where = (ByLayer, torch.device(device)) if gather == "layer" else (Sharded, torch.device(device))
    passes = Packed(compiled=False) if "bfloat16" in words else PADDED.in_lockstep()
    learner = learner_of(f"{words} model.device={device}", ALONE, kind(ALONE, where, offload=offload), passes)
    told = steps(learner, 2, [sampled(0), sampled(1)])
    weights, states = learner.weights(), learner.optimizer.state.values()
    own = Shards(0, 1)
    manifest = Manifest.of(weights, torch.bfloat16)
    own.carry_out({"do": "prepare", "manifest": manifest.to_json(), "slots": 2, "whole": []}, weights)
    found = own.carry_out({"do": "write", "slot": 1, "digest": True}, weights)
    sent = {name: view.cpu().clone() for name, view in own.slots.views[1].items()}
    assert found["bad"] is None and (found["sums"] is None) is (own.slots.device.type == "cpu")
    whole = {name: full(weights[name].detach()).cpu().bfloat16() for name in sent}
    own.close()
    dist.destroy_process_group()
    return {
        "steps": [[metrics, [each.cpu() for each in tensors]] for metrics, tensors in told],
        "shards": {local_part(p).device.type for p in learner.policy.parameters() if is_dtensor(p)},
        "moments": {local_part(t).device.type for state in states for t in state.values() if t.dim()},
        "computes": (learner.device.type, device_of(learner.policy).type),
        "sent": all(torch.equal(sent[name], whole[name]) for name in sent),
        "slots": own.slots.device.type,
    }


def in_a_process(*arguments: Any) -> dict[str, Any]:
    """With a group of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as made:
        return made.apply(held, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("words", [ALGOS[1], ALGOS[6]], ids=["ppo", "bfloat16"])
@pytest.mark.parametrize("gather", ["step", "layer"])
def test_what_is_offloaded_is_on_the_host_and_computes_what_a_gpu_that_holds_all_does(tmp_path, gather, words):
    told = {}
    for offload in (False, True):
        folder = tmp_path / str(offload)
        folder.mkdir()
        told[offload] = in_a_process(str(folder), "cuda", gather, offload, words)
    here, there = told[True], told[False]
    assert here["shards"] == here["moments"] == {"cpu"} and here["slots"] == "cpu" and here["sent"]
    assert there["shards"] == there["moments"] == {"cuda"} and there["slots"] == "cuda" and there["sent"]
    assert here["computes"] == there["computes"] == ("cuda", "cuda")
    for (metrics, weights), (expected, of_gpu) in zip(here["steps"], there["steps"], strict=True):
        assert metrics == pytest.approx(expected, rel=1e-2 if "bfloat16" in words else 1e-4, abs=1e-5)
        for mine, one in zip(weights, of_gpu, strict=True):
            torch.testing.assert_close(mine, one, rtol=CLOSE, atol=CLOSE if "bfloat16" not in words else 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("gather", ["step", "layer"])
def test_a_run_with_offloaded_shards_leaves_what_one_without_does(rlhf_train, tmp_path, gather):
    words = ("experiment=smoke", "model=micro", "steps=3", "sft.steps=4", "evaluate_every=3", "checkpoint.every=1")
    left = {}
    for offload in ("false", "true"):
        folder = tmp_path / offload
        ended = rlhf_train(
            *words,
            "trainer=sharded",
            "trainer.ranks=2",
            f"trainer.gather={gather}",
            f"trainer.offload={offload}",
            f"hydra.run.dir={folder}",
        )
        assert ended.returncode == 0, ended.stderr
        left[offload] = load_file(folder / "policy/model.safetensors"), rows_of(folder)
    for name, tensor in left["true"][0].items():
        torch.testing.assert_close(tensor, left["false"][0][name], rtol=1e-3, atol=1e-3)
    assert left["true"][1] == pytest.approx(left["false"][1], rel=1e-2)


def rows_of(folder: Path) -> list[float]:
    """The losses of a run's steps."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["train/grad_norm"] for row in rows if "train/grad_norm" in row]
