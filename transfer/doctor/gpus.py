"""What torch and the GPUs of this machine offer: versions, who is there, who reaches whom, a real CUDA IPC open."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from transfer.doctor.finding import Finding, Problem, ok, skip, warn
from transfer.doctor.host import MIB
from transfer.doctor.installed import declared, fits
from transfer.doctor.load import patient
from transfer.doctor.peer import beside

SMI_S = 10.0  # deadline of nvidia-smi
PEER_S = 25.0  # for another process to import torch, take a GPU and read
QUERY = "index,name,uuid,memory.total,memory.used,compute_mode,mig.mode.current"
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # its old name and its new one
NO_GPU = "no GPU here"


def torch_version(version: str | None = None) -> Finding:
    """Whether torch can be imported, is supported, and was built with CUDA."""
    began = time.monotonic()
    import torch

    seconds = time.monotonic() - began
    found, wanted = version or torch.__version__, declared()[1].get("torch", "")
    cuda = torch.version.cuda
    built = f"built with CUDA {cuda}" if cuda else "built without CUDA"
    seen = f"{found} (supported: {wanted or 'any'}), {built}, imported in {seconds:.1f} s"
    figures = {"version": str(found), "cuda": cuda, "import_seconds": round(seconds, 2)}
    if not fits(found, wanted):
        return warn(seen, f'pip install "torch{wanted}"', **figures)
    return ok(seen, **figures)


def shared_tensor(strategy: str = "file_system") -> Finding:
    """Whether a second process sees a tensor that torch shares by a file in /dev/shm."""
    import torch
    from torch import multiprocessing

    multiprocessing.set_sharing_strategy(strategy)
    context = multiprocessing.get_context("fork")  # no GPU is in use yet, and torch need not be imported again
    ours, theirs = context.Pipe()
    tensor = torch.randint(0, 256, (MIB,), dtype=torch.uint8)
    process = context.Process(target=_send_sum, args=(theirs,), daemon=True)
    process.start()
    try:
        ours.send(tensor)
        if not ours.poll(patient(SMI_S)):
            raise Problem(f"the other process did not open the tensor within {patient(SMI_S):g} s")
        said = ours.recv()
    except EOFError:
        raise Problem("the other process died while it opened the tensor") from None
    finally:
        process.kill()
        process.join()
    if said != int(tensor.sum(dtype=torch.int64)):
        raise Problem(f"the other process saw other values ({said})")
    return ok(f"a second process opened a tensor of 1 MiB that torch shares by {strategy}")


def _send_sum(connection: Any) -> None:
    import torch

    try:
        said: Any = int(connection.recv().sum(dtype=torch.int64))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    connection.send(said)


# --- GPUs -------------------------------------------------------------------------------------------------------------


def driver(command: str = "nvidia-smi", environment: Mapping[str, str] | None = None) -> Finding:
    """The GPUs that the driver knows, with UUIDs, memory, compute mode and MIG, whatever torch sees of them."""
    listed, rows = _smi(command, "-L"), _smi(command, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
    if listed is None or rows is None:
        return skip(f"{command} is not there: no NVIDIA driver")
    cells = [[cell.strip() for cell in row.split(",")] for row in rows]
    told = [f"{c[0]}: {c[1]}, {c[2]}, {c[4]} of {c[3]} MiB used, compute mode {c[5]}, MIG {c[6]}" for c in cells]
    visible = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    seen = "; ".join(told or ["no GPU"]) + ("" if visible is None else f"; CUDA_VISIBLE_DEVICES={visible!r}")
    mig = [line.strip() for line in listed if line.strip().startswith("MIG")]
    figures = {"gpus": len(cells), "mig": mig}
    if any(c[5] == "Exclusive_Process" for c in cells):
        do = "nvidia-smi -c DEFAULT (as root): one process alone may use such a GPU, and a worker is a second one"
        return warn(seen, do, **figures)
    if mig:
        return warn(f"{seen}; {len(mig)} MIG instances", "use them for transfer=ipc only if CUDA IPC is ok below")
    return ok(seen, **figures) if cells else skip(seen, **figures)


def _smi(command: str, *arguments: str) -> list[str] | None:
    """nvidia-smi's lines; None if there is none."""
    try:
        done = subprocess.run(
            [command, *arguments], capture_output=True, text=True, timeout=patient(SMI_S), check=False
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        raise Problem(
            f"{command} did not end within {patient(SMI_S):g} s", "look at dmesg: the driver may hang"
        ) from None
    if done.returncode:
        raise Problem(f"{command}: {done.stdout.strip() or done.stderr.strip()}", "look at the NVIDIA driver")
    return [line for line in done.stdout.splitlines() if line.strip()]


def devices(command: str = "nvidia-smi") -> Finding:
    """The GPUs that torch sees."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        return ok("; ".join(_described(index) for index in range(count)), count=count)
    listed = _smi(command, "-L")
    if not listed or not any(line.startswith("GPU") for line in listed):
        return skip(NO_GPU)
    if torch.version.cuda is None:
        raise Problem(f"torch was built without CUDA, and this machine has {listed[0]}", "install torch's CUDA build")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return skip(f"{NO_GPU} that torch may use: CUDA_VISIBLE_DEVICES={visible!r}")
    raise Problem(f"torch sees no GPU, and this machine has {listed[0]}", "compare the driver's CUDA with torch's")


def _described(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return f"cuda:{index}: {properties.name}, {properties.uuid}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def allocator(environment: Mapping[str, str] | None = None) -> Finding:
    """What torch's allocator is told, and what that means for handles."""
    given = os.environ if environment is None else environment
    told = {name: given[name] for name in ALLOCATOR if name in given}
    seen = ", ".join(f"{name}={value}" for name, value in told.items()) or "torch's default"
    if any("expandable_segments:true" in value.lower().replace(" ", "") for value in told.values()):
        return warn(
            f"{seen}: the one-shot API's handles cannot be opened; a session's slots are plain cudaMalloc and can",
            "leave expandable_segments out where the one-shot API is used",
        )
    return ok(f"{seen}: torch's memory is plain cudaMalloc, which can be exported")


def peer_access() -> Finding:
    """Which GPUs read each other's memory directly."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return skip("one GPU: there is no other to reach")
    pairs = {(a, b): torch.cuda.can_device_access_peer(a, b) for a in range(count) for b in range(count) if a != b}
    rows = [f"{a} to {', '.join(str(b) for b in range(count) if pairs.get((a, b))) or 'none'}" for a in range(count)]
    seen = f"direct: {'; '.join(rows)}"
    if not all(pairs.values()):
        return warn(seen, "keep trainer and sampler on GPUs that reach each other, or on one", rows=rows)
    return ok(seen, rows=rows)


def cuda_ipc(compute: str = "cuda:0") -> Finding:
    """Whether a second process maps 1 MiB of a GPU's memory by its handle; and which handles torch itself writes."""
    import torch

    from transfer.memory.regions import CudaRegion, device_uuid

    device = torch.device(compute)
    region = CudaRegion(MIB, device)
    region.bytes.copy_(torch.randint(0, 256, (MIB,), dtype=torch.uint8))
    torch.cuda.synchronize(device)
    expected = hashlib.sha256(region.bytes.cpu().numpy().tobytes()).hexdigest()
    with beside("map", device_uuid(device), region.handle, str(MIB)) as answer:
        said = answer(patient(PEER_S))
    region.close()
    if said["hash"] != expected:
        raise Problem("the other process read other bytes")
    version, kind = _handle_of(device)
    return ok(
        f"a second process mapped 1 MiB of {compute} by its handle; torch's own handles have version {version} and "
        f"kind {kind!r} ({'plain cudaMalloc' if kind == 'c' else 'expandable segments'})",
        handle_version=version,
        handle_kind=kind,
    )


def _handle_of(device: Any) -> tuple[int, str]:
    """The version and the kind at the start of a handle that torch makes (CUDACachingAllocator's shareIpcHandle)."""
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    handle = reduce_tensor(torch.zeros(16, device=device))[1][7]
    return handle[0], chr(handle[1])
