"""Handles as claims by a stranger: every field is compared with what was announced and with itself.

All of it happens before torch or the file system sees any field, and no function is taken from a handle (handles.py
says what is in one). Whose memory it may be is decided here, too: by the UUID of a GPU, or of the host in its place.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transfer.agreement.shown import MAX_SHOWN, shown
from transfer.engine.inert_pickle import DTYPE_BYTES, Global

MEMFD = "memfd"
ALIGN = 256  # bytes
MAX_UUIDS = 64  # entries in one tensor's handle
MAX_UUID_LENGTH = 128
MAX_DIMS = 64  # as torch has it
MAX_BYTES = 2**48
CUDA_FIELDS = 15
CUDA_HANDLE_BYTES = 66  # torch's version, "c" for plain cudaMalloc, and CUDA's 64
EVENT_HANDLE_BYTES = 64
REF_COUNTERS = 10_000  # in one of torch's counter files
REF_COUNTER_NAME = re.compile(rb"\A/torch_[0-9]{1,10}_[0-9]{1,20}_[0-9]{1,20}\Z")
TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
STORAGE_CLASSES = ("torch.storage.TypedStorage", "torch.storage.UntypedStorage")


# --- whose memory -----------------------------------------------------------------------------------------------------


@functools.cache
def host_id() -> str:
    """What stands in for a GPU's UUID on a CPU: the same in all processes that can find each other by process id."""
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        boot = file.read().strip()
    return "host-" + hashlib.sha256(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:32]


def gpu_uuid(index: int) -> str:
    """The UUID of a CUDA device by its index in this process, as vLLM writes it."""
    import torch

    return str(torch.cuda.get_device_properties(index).uuid)


def own_handle(handle: Any) -> tuple[str, Any]:
    """The (UUID, fields) of a tensor's `{UUID: fields}` that this process can open; ValueError if there is none.

    That of its own GPU, else that of the host, else that of another GPU to which its own has peer access.
    """
    require(
        isinstance(handle, Mapping)
        and len(handle) <= MAX_UUIDS
        and all(isinstance(key, str) and len(key) <= MAX_UUID_LENGTH for key in handle),
        f"an IPC handle must be a dict of at most {MAX_UUIDS} GPU UUIDs",
    )
    available = {_normal(uuid): fields for uuid, fields in handle.items()}
    own = _own_uuids()
    for uuid in itertools.chain(own, _peer_uuids()):
        if _normal(uuid) in available:
            return uuid, available[_normal(uuid)]
    raise ValueError(f"IPC handle not found for GPU UUID {own[0]}. Available UUIDs: {shown(list(handle), 400)}")


def _own_uuids() -> list[str]:
    import torch

    return [gpu_uuid(torch.cuda.current_device()), host_id()] if torch.cuda.is_available() else [host_id()]


def _peer_uuids() -> Iterator[str]:
    import torch

    for index in range(torch.cuda.device_count()):
        own = torch.cuda.current_device()
        if index != own and torch.cuda.can_device_access_peer(own, index):
            yield gpu_uuid(index)


def _normal(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-")


# --- what is claimed --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HostTensor:
    """A checked handle of a tensor in a memfd."""

    dtype: str
    shape: tuple[int, ...]
    memfd: tuple[int, int, int]  # process id, descriptor there, inode
    offset: int  # bytes
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class CudaTensor:
    """A checked handle of a tensor in CUDA memory: torch's fields from index 7 on, and what comes before them."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # elements
    offset: int  # elements
    storage: tuple[Any, ...] | None  # None for an empty tensor, which has no memory


def check(dtype: str, shape: Sequence[int], handle: Any) -> HostTensor | CudaTensor:
    """Compare a tensor's handle with the dtype and shape announced for it; ValueError that says what is wrong."""
    require(isinstance(dtype, str) and dtype in DTYPE_BYTES, f"dtype {shown(dtype)} is not known")
    require(_is_ints(shape), f"shape {shown(shape)} is not a list of sizes")
    reach = math.prod(max(1, length) for length in shape) * DTYPE_BYTES[dtype]  # an empty tensor has strides, too
    require(reach <= MAX_BYTES, f"shape {shown(shape)} has sizes of more than {MAX_BYTES} bytes together")
    uuid, fields = own_handle(handle)
    if uuid == host_id():
        return _check_host(dtype, tuple(shape), fields)
    if isinstance(fields, list | tuple) and len(fields) == 2:  # (function, fields), as early engines sent it
        fields = fields[1]
    return _check_cuda(dtype, tuple(shape), fields)


def _check_host(dtype: str, shape: tuple[int, ...], fields: Any) -> HostTensor:
    require(isinstance(fields, list | tuple) and len(fields) == 8, "a host memory handle has 8 fields")
    kind, pid, fd, inode, offset, size, handle_dtype, handle_shape = fields
    require(kind == MEMFD, f"a handle of this host begins with {MEMFD!r}")
    require(_is_count(pid, 2**31) and pid > 0, "the process id is out of range")
    require(_is_count(fd, 2**31) and _is_count(inode, 2**63), "the descriptor or inode is out of range")
    require(_is_count(offset, MAX_BYTES) and offset % ALIGN == 0, f"the offset is not a multiple of {ALIGN} bytes")
    require(handle_dtype == dtype, f"the message says {dtype}, the handle {_name(handle_dtype)}")
    require(
        _is_ints(handle_shape) and tuple(handle_shape) == shape,
        f"the message says shape {shown(list(shape))}, the handle {shown(handle_shape)}",
    )
    need = math.prod(shape) * DTYPE_BYTES[dtype]
    require(_is_count(size, MAX_BYTES) and size == need, f"{need} bytes are needed, the handle has {shown(size)}")
    return HostTensor(dtype, shape, (pid, fd, inode), offset, size)


def _check_cuda(dtype: str, shape: tuple[int, ...], fields: Any) -> CudaTensor:
    require(isinstance(fields, list | tuple) and len(fields) == CUDA_FIELDS, f"a CUDA handle has {CUDA_FIELDS} fields")
    cls, size, stride, offset, storage_cls, handle_dtype, device, *storage = fields
    require(_name(cls) in TENSOR_CLASSES, f"the tensor class must be one of {', '.join(TENSOR_CLASSES)}")
    require(_name(storage_cls) in STORAGE_CLASSES, f"the storage class must be one of {', '.join(STORAGE_CLASSES)}")
    require(_name(handle_dtype) == f"torch.{dtype}", f"the message says {dtype}, the handle {_name(handle_dtype)}")
    require(
        _is_ints(size) and tuple(size) == shape,
        f"the message says shape {shown(list(shape))}, the handle {shown(size)}",
    )
    require(_is_ints(stride) and len(stride) == len(shape), "the stride does not fit the shape")
    require(_is_count(offset, MAX_BYTES), "the offset is out of range")
    require(_is_count(device, 1024), "the device index is out of range")
    checked = _check_storage(storage)
    if math.prod(shape):
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        need = (last + 1) * DTYPE_BYTES[dtype]
        have = checked[1] if checked else 0
        require(need <= have, f"the tensor ends at byte {need} of its storage, which has {have}")
    return CudaTensor(dtype, shape, tuple(stride), offset, checked)


def _check_storage(storage: list[Any]) -> tuple[Any, ...] | None:
    handle, size, offset, requires_grad, counter, counter_offset, event, event_sync = storage
    if handle is None:
        return None
    require(
        isinstance(handle, bytes) and len(handle) == CUDA_HANDLE_BYTES and handle[1:2] == b"c",
        f"the CUDA IPC handle is not {CUDA_HANDLE_BYTES} bytes for plain cudaMalloc memory (in the trainer, leave "
        "expandable_segments out of PYTORCH_CUDA_ALLOC_CONF)",
    )
    require(_is_count(size, MAX_BYTES) and size > 0, "the storage size is out of range")
    require(_is_count(offset, MAX_BYTES), "the storage offset is out of range")
    require(isinstance(requires_grad, bool) and isinstance(event_sync, bool), "a flag is not a bool")
    require(
        isinstance(counter, bytes) and REF_COUNTER_NAME.match(counter) is not None,
        "the name of the reference counter file is not torch's",
    )
    require(_is_count(counter_offset, REF_COUNTERS), "the reference counter is out of range")
    require(isinstance(event, bytes) and len(event) == EVENT_HANDLE_BYTES, "the event handle has a wrong length")
    return handle, size, offset, False, counter, counter_offset, event, event_sync


def require(holds: bool, otherwise: str) -> None:
    """ValueError, saying `otherwise`, unless `holds`."""
    if not holds:
        raise ValueError(otherwise)


def _is_count(value: Any, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def _is_ints(values: Any) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) <= MAX_DIMS
        and all(_is_count(value, MAX_BYTES) for value in values)
    )


def _name(given: Any) -> str:
    """The full name of a class or dtype, which comes as itself (Ray) or as a mere name (inert_pickle)."""
    if isinstance(given, Global):
        return given.name
    if isinstance(given, type):
        return f"{given.__module__}.{given.__qualname__}"
    return given[:MAX_SHOWN] if isinstance(given, str) else shown(given)
