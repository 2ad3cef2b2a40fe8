"""Which GPUs the workers compute on, as CUDA_VISIBLE_DEVICES tells each of them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hydra.errors import CompactHydraException

from rlhf.config import HfRolloutConfig, VllmRolloutConfig
from rlhf.ranks.ray_hosts import reserved
from rlhf.rollout.gpus import visible_to_workers

TWO_EACH = ["rollout=vllm", "rollout.engine_args={tensor_parallel_size: 2}"]


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def hf(**keys):
    return HfRolloutConfig(**keys)


def tensor_parallel(size, **keys):
    return VllmRolloutConfig(engine_args={"tensor_parallel_size": size}, **keys)


@pytest.mark.parametrize(
    "rollout, variables, expected",
    [
        (hf(gpus=[2]), {}, ["2,0,1,3"]),
        (hf(workers=2, gpus=[3, 3]), {}, ["3,0,1,2"] * 2),
        (hf(workers=3), {}, ["0,1,2,3", "1,0,2,3", "2,0,1,3"]),
        (hf(workers=5), {}, ["0,1,2,3", "1,0,2,3", "2,0,1,3", "3,0,1,2", "0,1,2,3"]),
        (tensor_parallel(2, workers=2), {}, ["0,1,2,3", "2,3,0,1"]),
        (tensor_parallel(2, gpus=[3, 1]), {}, ["3,1,0,2"]),
        (hf(gpus=[1]), {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b,GPU-c,GPU-d"}, ["GPU-b,GPU-a,GPU-c,GPU-d"]),
    ],
)
def test_a_worker_sees_its_own_gpus_first_and_the_others_behind_them(four_gpus, rollout, variables, expected):
    assert visible_to_workers(rollout, copied=True, variables=variables) == expected


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["rollout.gpus=[0,1]"], r"must name 1: 1 for each of 1 workers \(got \[0, 1\]\)"),
        (
            ["rollout=vllm", "+rollout.engine_args.tensor_parallel_size=2", "rollout.gpus=[0]"],
            "must name 2: 2 for each",
        ),
        ([*TWO_EACH, "rollout.gpus=[1,1]"], "must name 2 different ones for each worker"),
        (["rollout.gpus=[0]", "model.device=cpu"], "for workers on GPUs"),
        (["rollout.gpus=[0]", "transfer=local"], "for workers that this run starts"),
        (["rollout.gpus=[0]", "transfer.sender.url=[http://127.0.0.1:1]", "transfer=disk"], "that this run starts"),
        (["rollout.gpus=[0]", "transfer/sender=ray", "transfer.sender.address=auto"], "leave out rollout.gpus"),
        (["rollout.gpus=[0]", "transfer.take=view"], "set transfer.take=copy, or leave out rollout.gpus"),
    ],
)
def test_gpus_that_do_not_go_with_the_workers_are_refused_before_anything_is_made(compose_run, overrides, said):
    with pytest.raises(CompactHydraException, match=said):
        compose_run(*overrides)


def test_workers_begin_behind_the_trainers_gpu_where_they_cannot_share_it(four_gpus):
    assert visible_to_workers(hf(workers=2), True, taken=[0], variables={}) == ["1,0,2,3", "2,0,1,3"]


def test_workers_that_view_the_trainers_memory_stay_on_its_gpu(four_gpus):
    assert visible_to_workers(hf(workers=2), copied=False) == []


@pytest.mark.parametrize(
    "rollout, said",
    [
        (hf(gpus=[4]), r"names \[4\], and 4 GPUs are visible here"),
    ],
)
def test_gpus_that_cannot_be_are_refused_with_the_key(four_gpus, rollout, said):
    with pytest.raises(ValueError, match=rf"rollout\.gpus {said}"):
        visible_to_workers(rollout, copied=True, variables={})
    with pytest.raises(ValueError, match=r"needs 8 GPUs, and 4 are visible here"):
        visible_to_workers(tensor_parallel(8), copied=True, variables={})
    with pytest.raises(ValueError, match=r"rollout\.gpus must be GPUs by their numbers from 0"):
        hf(gpus=[-1])


def test_a_worker_process_claims_its_gpus_before_anything_asks_cuda(tmp_path):
    program = (
        "import json, os, sys\n"
        "from rlhf.rollout import worker\n"
        "worker.Worker.from_spec = lambda spec: print(json.dumps(os.environ['CUDA_VISIBLE_DEVICES'])) or sys.exit(7)\n"
        "import transfer.worker.serve as serve\n"
        "serve.serve_alone = lambda spec, make: make()\n"
        f"worker.main([{str(tmp_path / 'spec.json')!r}])\n"
    )
    spec = {"architecture": {"model_type": "llama"}, "endpoint": {}, "visible": ["2,0,1"]}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False)
    assert (done.returncode, json.loads(done.stdout)) == (7, "2,0,1"), done.stderr


def test_workers_that_view_the_trainers_memory_are_on_its_gpu_and_those_that_copy_begin_with_it(four_gpus):
    assert visible_to_workers(hf(workers=2), copied=False, trainer=1, variables={}) == ["1,0,2,3"] * 2
    assert visible_to_workers(hf(workers=2), True, trainer=1, variables={}) == ["1,0,2,3", "2,0,1,3"]


def test_workers_leave_out_every_gpu_of_the_ranks_that_send_by_nccl_wherever_those_are(four_gpus):
    found = visible_to_workers(hf(workers=2), True, trainer=1, taken=[1, 3], variables={})
    assert found == ["2,0,1,3", "0,1,2,3"]
    assert visible_to_workers(hf(workers=1), True, taken=range(4), variables={}) == ["0,1,2,3"], "none is left"


def test_a_ray_reserves_gpus_for_workers_too_where_they_cannot_share_those_of_ranks(compose_run):
    words = "experiment=smoke", "trainer=sharded", "trainer.ranks=2", "trainer.address=auto", "transfer/sender=ray"
    by_nccl = *words, "transfer=nccl", "rollout.workers=3"
    assert reserved(compose_run(*words)) == 2, "which share those of ranks"
    assert reserved(compose_run(*by_nccl)) == 5
    assert reserved(compose_run(*by_nccl, "trainer.gpus=[1,5]")) == 6, "of which four are no rank's"
    assert reserved(compose_run(*by_nccl, "rollout.gpus=[2,3,7]")) == 8
    assert reserved(compose_run(*by_nccl, "trainer=replicas")) == 4, "of which the first rank alone sends"
