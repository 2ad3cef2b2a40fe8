"""Tensors <-> handles: a few numbers by which another process of this host finds a tensor's memory.

On a GPU a handle is what torch's own reductions make: 15 fields around a CUDA IPC handle, under the GPU's UUID. On a
CPU the host stands in for the GPU: the tensors are copied into a sealed memfd, which has no name in any file system and
goes with its last process, and a handle says where in it a tensor lies:

    ("memfd", pid, fd, inode, offset, bytes, dtype, shape)
"""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from transfer.engine.handle_check import ALIGN, MEMFD, CudaTensor, HostTensor, gpu_uuid, host_id, require
from transfer.engine.inert_pickle import DTYPE_BYTES
from transfer.engine.pledge import Pledge

if TYPE_CHECKING:
    import torch

MEMFD_NAME = "rlhf-weights"
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


# --- sending half -----------------------------------------------------------------------------------------------------


class Exporter(AbstractContextManager["Exporter"]):
    """Makes tensors readable for other processes until it is closed; close it when every receiver has acknowledged."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._end = 0
        self._exported: list[torch.Tensor] = []
        self.pledge: Pledge | None = None  # that device memory holds still, once it is `ready`

    def add(self, name: str, tensor: torch.Tensor, receivers: int = 1) -> list[dict[str, tuple[Any, ...]]]:
        """Each receiver's handle `{UUID: fields}` of a tensor on a CPU (copied now) or a GPU (kept where it is).

        ValueError for a tensor that is not plain and dense, of an unknown dtype or elsewhere.
        """
        tensor = _plain(name, tensor.detach())
        if tensor.device.type == "cpu":
            return [{host_id(): self._add_to_memfd(tensor)}] * receivers
        if tensor.device.type == "cuda":  # torch counts one release for one export, so each receiver gets its own
            uuid = gpu_uuid(tensor.device.index)
            return [{uuid: self._export_cuda(name, tensor)} for _ in range(receivers)]
        raise ValueError(f"{name!r} is on {tensor.device}: weights travel from a CPU or a CUDA device")

    def ready(self) -> None:
        """Everything is added: make host memory immutable, and wait for the kernels that still write device memory."""
        if self._fd is not None:
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        if self._exported:
            import torch

            for device in {tensor.device for tensor in self._exported}:
                torch.cuda.synchronize(device)
            self.pledge = Pledge()

    def close(self) -> None:
        """Give the memory back; a receiver that still has it open keeps it until it closes, too."""
        if self.pledge is not None:
            self.pledge.close()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self._exported:
            import torch

            self._exported.clear()
            torch.cuda.ipc_collect()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_to_memfd(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        if self._fd is None:
            self._fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        data = memoryview(_as_bytes(tensor).numpy())  # type: ignore[arg-type]
        offset = -(-self._end // ALIGN) * ALIGN
        written = 0
        while written < len(data):
            written += os.pwrite(self._fd, data[written:], offset + written)
        self._end = offset + len(data)
        inode = os.fstat(self._fd).st_ino
        return (MEMFD, os.getpid(), self._fd, inode, offset, len(data), _dtype_name(tensor.dtype), tuple(tensor.shape))

    def _export_cuda(self, name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
        import torch
        from torch.multiprocessing.reductions import reduce_tensor

        # An alias with a storage of its own: exporting wraps the storage for good, once more each time, and must not do
        # that to the trainer's parameters. The alias keeps the memory (a copy's, too) alive until it is dropped.
        if tensor.numel():
            shared = torch.from_dlpack(_as_bytes(tensor)).view(tensor.dtype).view(tensor.shape)
        else:
            shared = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        try:
            fields = reduce_tensor(shared)[1]
        except RuntimeError as error:
            raise RuntimeError(
                f"{name!r} cannot be exported by CUDA IPC (memory that itself came by IPC cannot, nor can some "
                f"allocators' pools): {error}"
            ) from error
        self._exported.append(shared)
        return fields


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    import torch

    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
        raise ValueError(
            f"{name!r} is a {type(tensor).__name__} of layout {tensor.layout}: make it a plain dense tensor"
        )
    if _dtype_name(tensor.dtype) not in DTYPE_BYTES:
        raise ValueError(f"{name!r} has dtype {_dtype_name(tensor.dtype)}, allowed: {', '.join(sorted(DTYPE_BYTES))}")
    return tensor.resolve_conj().resolve_neg()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as 1-D uint8: a view where the tensor is contiguous, else of a contiguous copy."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- receiving half ---------------------------------------------------------------------------------------------------


class Importer(AbstractContextManager["Importer"]):
    """Opens checked handles; on exit, waits until the device has read them and lets go of the trainer's memory."""

    def __init__(self) -> None:
        self._maps: dict[tuple[int, int, int], mmap.mmap] = {}
        self._opened: list[torch.Tensor] = []  # device memory stays open until the device has read it

    def open(self, handle: HostTensor | CudaTensor) -> torch.Tensor:
        """The tensor, in the trainer's memory: to be copied from and dropped; writes to host memory stay private."""
        return self._open_cuda(handle) if isinstance(handle, CudaTensor) else self._open_host(handle)

    def __exit__(self, *_: object) -> None:
        self._maps.clear()  # unmapped with the last tensor in them
        if self._opened:
            import torch

            torch.cuda.synchronize()
            self._opened.clear()
            torch.cuda.ipc_collect()

    def _open_host(self, handle: HostTensor) -> torch.Tensor:
        import torch

        dtype = getattr(torch, handle.dtype)
        if not handle.size:
            return torch.empty(handle.shape, dtype=dtype, device="cpu")
        if handle.memfd not in self._maps:
            self._maps[handle.memfd] = _map(*handle.memfd)
        memory = self._maps[handle.memfd]
        require(handle.offset + handle.size <= len(memory), "the handle ends outside the trainer's memory")
        data = torch.frombuffer(memory, dtype=torch.uint8, count=handle.size, offset=handle.offset)
        return data.view(dtype).view(handle.shape)

    def _open_cuda(self, handle: CudaTensor) -> torch.Tensor:
        import torch
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        dtype, device = getattr(torch, handle.dtype), torch.cuda.current_device()
        if handle.storage is None:
            return torch.empty(handle.shape, dtype=dtype, device=device)
        layout = (torch.Size(handle.shape), handle.stride, handle.offset)
        tensor = rebuild_cuda_tensor(torch.Tensor, *layout, torch.storage.TypedStorage, dtype, device, *handle.storage)
        self._opened.append(tensor)
        return tensor


def _map(pid: int, fd: int, inode: int) -> mmap.mmap:
    """A private mapping of the memfd that another process of this user shares; ValueError if it is anything else."""
    path = f"/proc/{pid}/fd/{fd}"
    with ExitStack() as cleanup:
        try:
            _check_name(os.readlink(path))  # before opening: to open a device or a pipe may have effects
            ours = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            raise ValueError(f"the trainer's memory is gone, or process {pid} is not this user's: {error}") from error
        cleanup.callback(os.close, ours)
        _check_name(os.readlink(f"/proc/self/fd/{ours}"))
        stat = os.fstat(ours)
        require(stat.st_uid == os.geteuid(), f"the memory belongs to user {stat.st_uid}, not to this one")
        require(stat.st_ino == inode, "the trainer's memory is not the one that the handle means")
        seals = fcntl.fcntl(ours, fcntl.F_GET_SEALS)
        require(seals & SEALS == SEALS, "the trainer's memory is not sealed")
        require(stat.st_size > 0, "the handle ends outside the trainer's memory")
        return mmap.mmap(ours, stat.st_size, access=mmap.ACCESS_COPY)


def _check_name(link: str) -> None:
    require(link == f"/memfd:{MEMFD_NAME} (deleted)", "the handle does not name memory that a trainer shares")
