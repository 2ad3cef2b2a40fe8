"""Memory that two processes see: a memfd on the host, or one cudaMalloc on a GPU. The owner writes, peers read.

A region lives as long as the last tensor that views it: closing it drops the reference only, so that nobody's weights
ever point at unmapped memory. The kernel frees all of it when the processes end, however they end.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import warnings
import weakref
from functools import cache
from typing import Any, Protocol

import torch

from transfer.agreement.manifest import Manifest, round_up

PAGE = 4096  # bytes; slots begin on page borders
CUDA_PAGE = 2**21  # bytes; of a cudaMalloc that is no multiple, another process or GPU reads a fifth more slowly
SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
FUTURE_WRITE = 0x0010  # F_SEAL_FUTURE_WRITE, linux/fcntl.h: nobody can write but by mappings that exist; Linux 5.1
HANDLE = re.compile(r"[0-9a-f]{128}")  # cudaIpcMemHandle_t, 64 bytes


class Region(Protocol):
    """A block of memory as bytes; `device` is where it lies."""

    bytes: torch.Tensor  # uint8 [nbytes]
    device: torch.device

    def close(self) -> None: ...


def slot_bytes(manifest: Manifest) -> int:
    """The distance between two slots that each hold the weights of `manifest`, bytes."""
    return max(PAGE, round_up(manifest.nbytes, PAGE))


def tensors(region: Region, manifest: Manifest, slot: int) -> dict[str, torch.Tensor]:
    """The weights in one slot, by entry name, as views of the region."""
    size = slot_bytes(manifest)
    return views_of(region.bytes[slot * size : (slot + 1) * size], manifest)


def views_of(block: torch.Tensor, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The weights in a block of bytes, by entry name, where the manifest's offsets say."""
    raw = {entry: block[entry.offset : entry.offset + entry.nbytes] for entry in manifest.entries}
    return {entry.name: part.view(entry.torch_dtype).view(entry.shape) for entry, part in raw.items()}


# --- host -------------------------------------------------------------------------------------------------------------


class HostRegion:
    """A memfd without a name anywhere, sealed against resizing and touched once, so that no later write is slow.

    Once it is mapped here it is sealed against every other writer, too, where the kernel can (`sealed`).
    """

    device = torch.device("cpu")

    def __init__(self, nbytes: int) -> None:
        self._fd = os.memfd_create("transfer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, nbytes)
            self.bytes = _mapped(self._fd, nbytes, mmap.PROT_READ | mmap.PROT_WRITE)
            self.sealed = seal(self._fd)
        except BaseException:
            os.close(self._fd)
            raise

    def read_only_fd(self) -> int:
        """A new descriptor of the same memory that is open for reading alone; the caller closes it.

        Without `sealed` its holder can open it anew for writing, under /proc/self/fd.
        """
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Give up the descriptor and this side's view."""
        fd, self._fd = self._fd, -1  # whoever still asks for it must not get what has its number next
        os.close(fd)
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")


class PeerHostRegion:
    """Another process's host region, mapped read-only; ValueError unless it is sealed and has `nbytes`."""

    device = torch.device("cpu")

    def __init__(self, fd: int, nbytes: int) -> None:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
        if sealed & SEALS != SEALS or size != nbytes:
            raise ValueError(f"the shared memory must be sealed and have {nbytes} bytes (seals {sealed}, {size} bytes)")
        self.bytes = _mapped(fd, nbytes, mmap.PROT_READ)

    def close(self) -> None:
        """Give up this side's view."""
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")


def seal(fd: int) -> bool:
    """Let the size of a memfd be for good, and nobody write to it but by mappings that exist; False if they still can.

    That is on a kernel before Linux 5.1, or one that only looks like Linux.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | FUTURE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the seal is known, and something else is wrong
            raise
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return False
    return True


def _mapped(fd: int, nbytes: int, protection: int) -> torch.Tensor:
    """The file's bytes as a tensor that keeps the mapping alive; all pages are mapped at once."""
    import numpy

    mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=protection)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(numpy.frombuffer(mapping, dtype=numpy.uint8))


# --- CUDA -------------------------------------------------------------------------------------------------------------


class CudaRegion:
    """One plain cudaMalloc on a GPU, which unlike torch's own pools can be exported as a whole; `handle` opens it."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            pointer = ctypes.c_void_p()
            whole = ctypes.c_size_t(round_up(nbytes, CUDA_PAGE))
            check(cuda_runtime().cudaMalloc(ctypes.byref(pointer), whole))
            self.bytes = _as_tensor(pointer.value or 0, nbytes, device, "cudaFree").zero_()  # also the gaps
            handle = _IpcHandle()
            check(cuda_runtime().cudaIpcGetMemHandle(ctypes.byref(handle), pointer))
        self.handle = bytes(handle.reserved).hex()

    def close(self) -> None:
        """Give up this side's view; the memory is freed with its last tensor."""
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")


class PeerCudaRegion:
    """Another process's CUDA region on the GPU with this UUID, opened by `reader`, the GPU that will read it.

    ValueError if that is another GPU, which cannot see the first or has no peer access to it.
    """

    def __init__(self, uuid: str, handle: str, nbytes: int, reader: torch.device | None = None) -> None:
        if not HANDLE.fullmatch(handle):
            raise ValueError("a CUDA memory handle must be 128 hexadecimal digits")
        owner = _device_with(uuid)
        if reader is None or reader.type != "cuda":
            reader = owner
        if reader != owner and not torch.cuda.can_device_access_peer(reader, owner):
            raise ValueError(f"{reader} cannot read the memory of {owner} (no peer access): use transfer=nccl or gloo")
        self.device = owner
        with torch.cuda.device(reader):
            torch.cuda.current_stream().synchronize()  # makes sure that the context exists
            pointer = ctypes.c_void_p()
            raw = _IpcHandle.from_buffer_copy(bytes.fromhex(handle))
            lazy_peer_access = ctypes.c_uint(1)
            check(cuda_runtime().cudaIpcOpenMemHandle(ctypes.byref(pointer), raw, lazy_peer_access))
            self.bytes = _as_tensor(pointer.value or 0, nbytes, reader, "cudaIpcCloseMemHandle")

    def close(self) -> None:
        """Give up this side's view; the handle is closed with its last tensor."""
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")


def device_uuid(device: torch.device) -> str:
    """A GPU's UUID, lower-case and without "GPU-": the same in every process, whatever CUDA_VISIBLE_DEVICES says."""
    return str(torch.cuda.get_device_properties(device).uuid).lower().removeprefix("gpu-")


def _device_with(uuid: str) -> torch.device:
    visible = {device_uuid(torch.device("cuda", i)): i for i in range(torch.cuda.device_count())}
    if uuid not in visible:
        raise ValueError(f"GPU {uuid} is not visible here; visible: {', '.join(visible) or 'none'}")
    return torch.device("cuda", visible[uuid])


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class _Pointer:
    """Device memory in the form that torch.as_tensor takes without copying; the tensor keeps this object alive."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _as_tensor(address: int, nbytes: int, device: torch.device, release: str) -> torch.Tensor:
    """The bytes there as a tensor, on whatever device torch takes them for; `device` releases them in the end."""
    holder = _Pointer(address, nbytes)
    freed = weakref.finalize(holder, _release, release, address, device)
    freed.atexit = False  # the driver frees it then; torch may be half gone
    devices = [device, *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    where = next((d for d in devices if torch.as_tensor(_Pointer(address, 1), device=d).data_ptr() == address), None)
    if where is None:
        raise RuntimeError(f"torch finds the memory of {device} that was opened on no GPU")
    return torch.as_tensor(holder, device=where)  # asked for another device, torch would copy


def _release(function: str, address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)  # nothing queued may still read it
        check(getattr(cuda_runtime(), function)(ctypes.c_void_p(address)))


@cache
def cuda_runtime() -> Any:
    """The CUDA runtime that torch itself has loaded."""
    torch.cuda.init()
    library = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}")
    library.cudaGetErrorString.restype = ctypes.c_char_p
    library.cudaIpcOpenMemHandle.argtypes = [ctypes.c_void_p, _IpcHandle, ctypes.c_uint]
    return library


def check(status: int) -> None:
    """RuntimeError with CUDA's own words if a call of its runtime has failed."""
    if status:
        cuda_runtime().cudaGetLastError()  # so that torch does not report it again
        raise RuntimeError(f"CUDA: {cuda_runtime().cudaGetErrorString(status).decode()} (error {status})")
