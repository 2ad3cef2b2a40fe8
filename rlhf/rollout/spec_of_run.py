"""What the workers of a run are told, from its configuration and its policy."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.config import EvaluationConfig, RunConfig, VllmRolloutConfig
from rlhf.config.algo import DpoConfig
from rlhf.config.rollout import KvAfterUpdate, Order
from rlhf.rollout.build import architecture_of
from rlhf.rollout.gpus import visible_to_workers
from rlhf.rollout.spec import WorkerSpec
from transfer.agreement.dtensor import is_dtensor
from transfer.config import CollectiveConfig, InFlight, IpcConfig, Library, Take

JOURNALS = "journal"  # folder of a run: who did what to the weights, a file a process
LEAST_ROWS = 32  # that vLLM prepares for
MOST_ROWS = 1024  # as vLLM has it by default on large GPUs; further rows wait


def worker_spec(
    policy: Any, config: RunConfig | EvaluationConfig, endpoint: Mapping[str, Any], base: str | None = None
) -> WorkerSpec:
    """What a worker needs to hold a copy of `policy` and to take updates from the session of `endpoint`.

    `base`: from where it loads the weights below the policy's adapter.
    """
    import torch

    from rlhf.models.adapter import spec_of

    parameter = next(policy.parameters())
    dtype = config.rollout.dtype or config.model.dtype
    return WorkerSpec(
        architecture=architecture_of(policy),
        endpoint=dict(endpoint),
        dtype=dtype.name,
        device=parameter.device.type,
        visible=gpus_of_workers(policy, config),
        attention=policy.config._attn_implementation,
        code=_code_of(policy),
        **_engine(config),
        batch_invariant=is_invariant(config, parameter.device.type),
        threads=config.threads,
        token=secrets.token_urlsafe(32),
        adapter=None if base is None else spec_of(policy, config.model.lora, base, getattr(torch, dtype.name)),
    )


def is_invariant(config: RunConfig | EvaluationConfig, device: str) -> bool:
    """Whether a row's bits are not to depend on the rows beside it: null is on where a run is exact only with it."""
    rollout = config.rollout
    if rollout.batch_invariant is not None:
        return rollout.batch_invariant
    exact = isinstance(config, RunConfig) and rollout.ahead.lag > 0 and rollout.ahead.order is Order.exact
    return exact and device == "cpu" and config.threads == 1 and not isinstance(rollout, VllmRolloutConfig)


def _code_of(policy: Any) -> str:
    """The checkpoint whose own code the policy is made of; empty where it is transformers'."""
    if not policy.is_remote_code():
        return ""
    folder = Path(policy.name_or_path)
    return str(folder.resolve()) if folder.is_dir() else policy.name_or_path


def _engine(config: RunConfig | EvaluationConfig) -> dict[str, Any]:
    """Which engine samples, and how it is made."""
    rollout = config.rollout
    recomputes = rollout.kv_after_update is KvAfterUpdate.recompute
    if not isinstance(rollout, VllmRolloutConfig):
        return {"recompute_cache": recomputes}
    settings: dict[str, Any] = {"max_num_seqs": min(rows_at_once(config), MOST_ROWS)}
    batched = rollout.engine_args.get("max_num_batched_tokens")
    if isinstance(batched, int):  # of which vLLM wants one a row at least
        settings["max_num_seqs"] = min(settings["max_num_seqs"], batched)
    if rollout.sleep_level:
        settings["enable_sleep_mode"] = True
    if rollout.in_flight is InFlight.keep:
        settings["async_scheduling"] = False  # so that a step's tokens are those of the step before new weights
    return {
        "engine": "vllm",
        "engine_args": {**settings, **rollout.engine_args},
        "keep_prefix_cache": rollout.keep_prefix_cache,
        "recompute_cache": recomputes,
    }


def rows_at_once(config: RunConfig | EvaluationConfig) -> int:
    """Rows that a worker samples together, at most, in a step or an evaluation: vLLM prepares for no more."""
    asked = [(config.task.held_out, config.evaluate.samples)]
    if isinstance(config, RunConfig):
        prompts = config.algo.prompts if isinstance(config.algo, DpoConfig) else config.prompts_per_step
        asked.append((prompts, config.samples_per_prompt))
    rows = [
        min(-(-prompts // config.rollout.workers) * n, max(config.rollout.rows_per_request, n)) for prompts, n in asked
    ]
    return max(LEAST_ROWS, *rows)


def gpus_of_workers(policy: Any, config: RunConfig | EvaluationConfig) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker; [] where all see what the trainer sees."""
    parameter = next(policy.parameters())
    return _visible(config, _ranks_with(parameter)) if parameter.device.type == "cuda" else []


def numbered(spec: WorkerSpec, index: int, folder: Path) -> WorkerSpec:
    """What the worker of this number is told: as all others, its own GPUs, and a journal of its own in `folder`."""
    journal = str(folder / JOURNALS / f"worker-{index}.jsonl")
    return replace(spec, journal=journal, visible=spec.visible[index : index + 1])


def _ranks_with(parameter: Any) -> int:
    """How many ranks of the trainer hold a part of it."""
    return int(parameter.device_mesh.size()) if is_dtensor(parameter) else 1


def _visible(config: RunConfig | EvaluationConfig, ranks: int) -> list[str]:
    """The GPUs of each worker: not those of the `ranks` that send, where there are others, if weights go by NCCL."""
    transfer = config.transfer
    by_nccl = isinstance(transfer, CollectiveConfig) and transfer.library is Library.nccl
    copied = not isinstance(transfer, IpcConfig) or transfer.take is Take.copy
    of_ranks = (isinstance(config, RunConfig) and config.trainer.gpus) or range(ranks)
    return visible_to_workers(config.rollout, copied, of_ranks[0], of_ranks[:ranks] if by_nccl else ())
