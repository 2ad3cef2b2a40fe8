"""Which transfers go with which workers and models: rules across groups, of a run and of an evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf.config.model import Device
from rlhf.config.rollout import VllmRolloutConfig
from rlhf.config.trainer import ShardedConfig
from transfer.config import (
    NO_KEEP,
    CollectiveConfig,
    DiskConfig,
    HandlesConfig,
    HttpSenderConfig,
    InFlight,
    IpcConfig,
    Library,
    LocalConfig,
    RaySenderConfig,
    Staging,
    Take,
)

if TYPE_CHECKING:
    from rlhf.config.run import EvaluationConfig, RunConfig


def choose_take(run: RunConfig | EvaluationConfig, sharded: bool) -> None:
    """Let `transfer.take=auto` be what fits: workers view the trainer's slots, unless they can only be copied."""
    if isinstance(run.transfer, IpcConfig) and run.transfer.take is Take.auto:
        copied = sharded or isinstance(run.rollout, VllmRolloutConfig) or run.rollout.gpus is not None
        run.transfer = replace(run.transfer, take=Take.copy if copied else Take.view)


def check_transfer(run: RunConfig | EvaluationConfig) -> None:
    """Raise ValueError where the transfer does not fit the workers or the model."""
    if isinstance(run.transfer, LocalConfig) and run.rollout.workers != 1:
        raise ValueError(
            f"transfer=local samples inside the trainer's process: rollout.workers must be 1 "
            f"(got {run.rollout.workers}); choose transfer=ipc for more"
        )
    if isinstance(run.transfer, LocalConfig) and run.rollout.dtype not in (None, run.model.dtype):
        raise ValueError(
            "transfer=local samples with the learner's own weights: rollout.dtype must be null "
            f"(got {run.rollout.dtype.name})"  # type: ignore[union-attr]
        )
    _check_ray(run)
    if isinstance(run.transfer, IpcConfig) and run.transfer.exposes and run.rollout.in_flight is InFlight.keep:
        raise ValueError(NO_KEEP)
    live = isinstance(run.transfer, IpcConfig) and run.transfer.staging is Staging.live
    if live and run.rollout.dtype not in (None, run.model.dtype):
        raise ValueError(
            "transfer.staging=live shares the trainer's own parameters as they are: rollout.dtype must be null "
            f"(got {run.rollout.dtype.name}); choose transfer.staging=arena to cast them"  # type: ignore[union-attr]
        )
    if isinstance(run.rollout, VllmRolloutConfig):
        _check_vllm(run)
    elif isinstance(run.transfer, HandlesConfig):
        raise ValueError("transfer=handles speaks to vLLM servers: set rollout=vllm")
    nccl = isinstance(run.transfer, CollectiveConfig) and run.transfer.library is Library.nccl
    if nccl and run.model.device is Device.cpu:
        raise ValueError(
            "transfer=nccl moves weights between GPUs: set model.device=cuda (got cpu), or use transfer=gloo"
        )
    if run.rollout.gpus is not None:
        _check_gpus(run, run.rollout.gpus)
    sender = run.transfer.sender
    ours = not isinstance(run.rollout, VllmRolloutConfig)  # vLLM's servers are told where the memory is
    if isinstance(sender, HttpSenderConfig) and sender.url and isinstance(run.transfer, IpcConfig) and ours:
        raise ValueError(
            "transfer.sender.url names workers that already run, and transfer=ipc shares memory only with workers "
            "that this run starts: use transfer=disk with a folder that both sides see, or leave url empty"
        )


def _check_gpus(run: RunConfig | EvaluationConfig, gpus: list[int]) -> None:
    """Raise ValueError where the workers cannot be on these GPUs."""
    rollout, sender = run.rollout, run.transfer.sender
    each, trainer, hosts = rollout.gpus_each, getattr(run, "trainer", None), _hosts_of_workers(run)
    there = -(-rollout.workers // hosts)
    if len(gpus) != there * each:
        of_a_host = f" of a host, of trainer.hosts={hosts}" if hosts > 1 else ""
        raise ValueError(
            f"rollout.gpus must name {there * each}: {each} for each of {there} workers{of_a_host} (got {gpus})"
        )
    if any(len({*gpus[start : start + each]}) < each for start in range(0, len(gpus), each)):
        raise ValueError(f"rollout.gpus must name {each} different ones for each worker (got {gpus})")
    if run.model.device is Device.cpu:
        raise ValueError("rollout.gpus is for workers on GPUs: leave it out, or set model.device=cuda (got cpu)")
    if isinstance(run.transfer, LocalConfig) or (isinstance(sender, HttpSenderConfig) and sender.url):
        raise ValueError("rollout.gpus is for workers that this run starts: leave it out")
    placed = trainer is not None and trainer.address is not None
    if isinstance(sender, RaySenderConfig) and sender.address is not None and not placed:
        raise ValueError("a Ray that is there gives its actors their GPUs: leave out rollout.gpus")
    if isinstance(run.transfer, IpcConfig) and run.transfer.take is Take.view:
        raise ValueError("workers on GPUs of their own copy weights: set transfer.take=copy, or leave out rollout.gpus")


def _check_vllm(run: RunConfig | EvaluationConfig) -> None:
    """Raise ValueError where vLLM cannot take the weights, or sample as asked."""
    if isinstance(run.transfer, LocalConfig):
        raise ValueError("rollout=vllm holds weights of its own: transfer must be ipc, disk or handles (got local)")
    if isinstance(run.transfer, CollectiveConfig):
        raise ValueError(
            f"rollout=vllm takes weights from memory or files: transfer must be ipc or disk "
            f"(got {run.transfer.library.value})"
        )
    if run.rollout.serve and not isinstance(run.transfer.sender, HttpSenderConfig):  # type: ignore[attr-defined]
        raise ValueError("rollout.serve=true starts servers that speak HTTP: set transfer/sender=http")
    sender = run.transfer.sender
    servers = run.rollout.serve or (isinstance(sender, HttpSenderConfig) and sender.url)  # type: ignore[attr-defined]
    if isinstance(run.transfer, HandlesConfig) and run.model.lora.rank:
        raise ValueError("transfer=handles sends the trainer's own tensors: model.lora.rank must be 0, or transfer=ipc")
    if run.rollout.found_paused and not (isinstance(sender, HttpSenderConfig) and sender.url):  # type: ignore[attr-defined]
        raise ValueError("rollout.found_paused=true is for servers that run already: name them in transfer.sender.url")
    if servers and isinstance(run.transfer, DiskConfig):
        raise ValueError("vLLM servers take weights from memory: transfer must be ipc or handles (got disk)")
    if isinstance(run.transfer, IpcConfig) and run.transfer.take is Take.view:
        raise ValueError(
            "rollout=vllm copies weights into its own memory, whose addresses stay: set transfer.take=copy (got view)"
        )


def _hosts_of_workers(run: RunConfig | EvaluationConfig) -> int:
    """On how many of the trainer's hosts a Ray places workers; others are all on the first."""
    trainer = getattr(run, "trainer", None)
    placed = trainer is not None and trainer.address is not None and isinstance(run.transfer.sender, RaySenderConfig)
    return int(trainer.hosts) if placed else 1  # type: ignore[union-attr]


def _check_ray(run: RunConfig | EvaluationConfig) -> None:
    """A run is in one Ray, and what it sends reaches all hosts that have workers."""
    trainer, sender = getattr(run, "trainer", None), run.transfer.sender
    if trainer is None or trainer.address is None or not isinstance(sender, RaySenderConfig):
        return
    if sender.address not in (None, trainer.address):
        raise ValueError(
            "workers are in the Ray that has started the trainer's ranks: leave out transfer.sender.address (got "
            f"{sender.address}, and trainer.address={trainer.address})"
        )
    if min(trainer.hosts, run.rollout.workers) == 1:
        return
    if isinstance(run.transfer, CollectiveConfig) and run.transfer.host.startswith(("127.", "localhost", "::1")):
        raise ValueError(
            f"workers are on trainer.hosts={trainer.hosts} hosts, of which the others cannot connect to transfer.host="
            f"{run.transfer.host}: set it to an address of this host that they reach"
        )
    if not isinstance(trainer, ShardedConfig) and isinstance(run.transfer, IpcConfig):
        raise ValueError(
            f"transfer=ipc has whole weights in the first host's memory alone, and workers are on trainer.hosts="
            f"{trainer.hosts} hosts: use trainer=sharded, transfer=disk, gloo or nccl, or transfer/sender=http"
        )
