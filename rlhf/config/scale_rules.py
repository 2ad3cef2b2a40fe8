"""What a run that goes on may be asked for: more workers than it has begun with, or further ones that run already."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.config.rollout import VllmRolloutConfig
from rlhf.config.run import RunConfig
from transfer.config import DiskConfig, HttpSenderConfig, IpcConfig, LocalConfig

IN_PROCESS = "transfer=local samples inside the trainer's process: there is one worker, always"


def most_workers(config: RunConfig) -> int:
    """A further one would never have a prompt."""
    return max(config.prompts_per_step, config.task.held_out, config.rollout.workers)


def check_number(config: RunConfig, workers: int, there: int) -> None:
    """ValueError unless the run may have so many, in place of those that are `there`."""
    if isinstance(config.transfer, LocalConfig):
        raise ValueError(IN_PROCESS)
    if workers < 1:
        raise ValueError(f"a run has at least 1 worker (got {workers})")
    if workers <= there:
        return
    if workers > (most := most_workers(config)):
        raise ValueError(
            f"at most {most} workers have anything to do: prompts_per_step={config.prompts_per_step}, task.held_out="
            f"{config.task.held_out} (got {workers})"
        )
    sender, gpus = config.transfer.sender, config.rollout.gpus
    urls = sender.url if isinstance(sender, HttpSenderConfig) else []
    if urls and workers > max(len(urls), there):
        raise ValueError(
            f"transfer.sender.url names {len(urls)} workers, and this run starts none (got {workers}): a further one "
            "that runs already comes by --join URL"
        )
    if gpus is not None and workers > max(config.rollout.workers, there):
        raise ValueError(
            f"rollout.gpus={gpus} names the GPUs of {config.rollout.workers} workers (got {workers}): leave it out, or "
            "name those of all that there may be in a run that is begun with them"
        )


def check_joining(config: RunConfig, urls: Sequence[str]) -> None:
    """ValueError unless workers that run already, at these URLs, can take this run's weights."""
    if isinstance(config.transfer, LocalConfig):
        raise ValueError(IN_PROCESS)
    for url in urls:
        HttpSenderConfig(url=[url])
    servers = isinstance(config.rollout, VllmRolloutConfig)  # which are told where the memory is
    if isinstance(config.transfer, IpcConfig) and not servers:
        raise ValueError(
            "transfer=ipc shares memory only with workers that this run starts: a worker joins by its URL with "
            "transfer=disk, gloo or nccl"
        )
    if isinstance(config.transfer, DiskConfig) and servers:
        raise ValueError("a vLLM server takes weights from memory: it joins with transfer=ipc or handles (got disk)")
