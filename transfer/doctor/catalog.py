"""All checks of the doctor, in the order in which they are shown."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from transfer.doctor.finding import Check

SYSTEM, GPU, TRANSFERS = "this machine", "GPUs", "transfers of 1 MiB, each with a worker process"
TORCH, DEVICES, PEERS, RAY = "torch", "GPUs that torch sees", "peer access", "Ray starts"
IPC_WAYS = (("arena", "view"), ("arena", "copy"), ("live", "copy"), ("live", "view"))  # staging, take
LEFT_OUT = "left out by --quick"
MANY_CORES = 8  # enough for every transfer to have a lane of its own: most of their time is imports

HOST_CHECKS = (
    Check("Python", SYSTEM, "host", "installed:python"),
    Check("packages", SYSTEM, "host", "installed:packages"),
    Check(TORCH, SYSTEM, "torch", "gpus:torch_version", deadline_s=25, do="pip install -e . in the repository"),
    Check("free memory", SYSTEM, "host", "host:memory"),
    Check(
        "memfd",
        SYSTEM,
        "host",
        "host:memfd",
        do="transfer=ipc needs it on a CPU: allow memfd_create in the container's seccomp profile (and set "
        "vm.memfd_noexec below 2), or use transfer=disk",
    ),
    Check(
        "descriptors between processes",
        SYSTEM,
        "host",
        "host:descriptors",
        deadline_s=20,
        needs=("memfd",),
        do="transfer=ipc needs abstract Unix sockets on a CPU: run trainer and workers in one network namespace "
        "as one user, or use transfer=disk",
    ),
    Check(
        "memory by /proc/<pid>/fd",
        SYSTEM,
        "host",
        "host:proc_descriptors",
        deadline_s=20,
        needs=("memfd",),
        do="the one-shot API needs it on a CPU: run both processes as one user in one pid namespace, with /proc "
        "mounted without hidepid; transfer=ipc can do without it",
    ),
    Check("/dev/shm", SYSTEM, "host", "host:shared_folder", do="mount a tmpfs there; transfer=ipc can do without it"),
    Check(
        "tensors by torch's files",
        SYSTEM,
        "torch",
        "gpus:shared_tensor",
        deadline_s=20,
        needs=(TORCH,),
        do="give the container a larger /dev/shm; transfer=ipc can do without it",
    ),
    Check(
        "loopback HTTP",
        SYSTEM,
        "host",
        "host:loopback",
        deadline_s=20,
        do="bring the loopback interface up (ip link set lo up), or use transfer=local",
    ),
    Check("open files", SYSTEM, "host", "host:open_files"),
    Check("container", SYSTEM, "host", "host:container"),
    Check("Ray", SYSTEM, "host", "installed:ray_installed"),
)
GPU_CHECKS = (
    Check("driver", GPU, "host", "gpus:driver", deadline_s=25),
    Check(DEVICES, GPU, "torch", "gpus:devices", deadline_s=25, needs=(TORCH,)),
    Check("allocator", GPU, "torch", "gpus:allocator", needs=(TORCH, DEVICES)),
    Check(PEERS, GPU, "torch", "gpus:peer_access", needs=(TORCH, DEVICES)),
    Check(
        "CUDA IPC",
        GPU,
        "cuda",
        "gpus:cuda_ipc",
        deadline_s=25,
        needs=(TORCH, DEVICES),
        do="transfer=ipc needs it on a GPU: run both processes in one pid and ipc namespace (for staging=live "
        "take=copy one network namespace, too), without MIG and in compute mode Default; else use transfer=disk",
    ),
)


def checks(quick: bool = False, patience: float = 1.0) -> list[Check]:
    """Every check, with its deadline times `patience`; with `quick` those that need a Ray are left out."""
    ray = Check(
        RAY,
        TRANSFERS,
        "ray",
        "sessions:ray_start",
        deadline_s=25,
        needs=("Ray",),
        do="use transfer/sender=http; if a path is too long, set TMPDIR to a short one",
        skip=LEFT_OUT if quick else "",
    )
    listed = [*HOST_CHECKS, *GPU_CHECKS, *_on("cpu"), ray, *_over_ray("cpu"), *_on("cuda:0"), *_over_ray("cuda:0")]
    return [
        replace(check, target=f"transfer.doctor.{check.target}", deadline_s=check.deadline_s * patience)
        for check in listed
    ]


def _on(device: str) -> list[Check]:
    """The transfers that need no Ray, with weights on this device."""
    found = [_session("ipc", "http", device, staging=s, take=t) for s, t in IPC_WAYS]
    found += [_session("gloo", "http", device), _session("disk", "http", device)]
    one_shot = {"sender": "http", "device": device}
    found.append(_transfer(f"one-shot API, http{_where(device)}", "one_shot", one_shot))
    shards = _transfer(f"ipc, shards of 2 ranks{_where(device)}", "shards", {"device": device})
    found.append(shards if device == "cpu" else replace(shards, needs=(*shards.needs, PEERS)))
    if device == "cpu":
        found.append(_transfer("local", "local", {}))
    else:
        between = _session("ipc", "http", device, staging="live", take="copy", worker_device="cuda:1")
        found.append(replace(between, name=f"{between.name} to cuda:1", needs=(*between.needs, PEERS)))
    lanes = len(found) if (os.cpu_count() or 1) >= MANY_CORES else 2
    return [replace(check, lane=f"{device} {index % lanes}") for index, check in enumerate(found)]


def _over_ray(device: str) -> list[Check]:
    found = [_session("ipc", "ray", device, staging=s, take=t) for s, t in IPC_WAYS]
    found.append(_session("disk", "ray", device))
    return [replace(check, lane="ray", needs=(*check.needs, RAY)) for check in found]


def _session(backend: str, sender: str, device: str, **way: Any) -> Check:
    how = f" {way['staging']}+{way['take']}" if way else ""
    told = {"backend": backend, "sender": sender, "device": device, **way}
    return _transfer(f"{backend}{how}, {sender}{_where(device)}", "session", told)


def _transfer(name: str, function: str, arguments: dict[str, Any]) -> Check:
    on_gpu = arguments.get("device", "cpu") != "cpu"
    needs = (TORCH, DEVICES) if on_gpu else (TORCH,)
    return Check(name, TRANSFERS, "", f"sessions:{function}", arguments, deadline_s=25, needs=needs)


def _where(device: str) -> str:
    return "" if device == "cpu" else f", {device}"
