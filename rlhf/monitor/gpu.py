"""What NVML says of GPUs: memory of each process, and whether a kernel runs. Nothing where there is no NVML.

Its Python package (nvidia-ml-py) is optional; Ray brings a copy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

PACKAGES = ("pynvml", "ray._private.thirdparty.pynvml")
SAMPLE_S = 0.2  # between two looks at how busy the GPU is; NVML's own period is 1/6 to 1 s
GPU_MEMORY = "gpu_memory_mib"  # metrics of this group, and a field of a worker's status
MIB = 2**20


def gpu_peak(reserved: bool = True) -> float | None:
    """The most MiB of a GPU that torch has taken in this process, or its tensors have; None while it uses none."""
    import torch

    if not torch.cuda.is_initialized():  # to ask whether there is one would settle which GPUs this process may see
        return None
    return (torch.cuda.max_memory_reserved() if reserved else torch.cuda.max_memory_allocated()) / MIB


def found() -> tuple[Any, Any] | None:
    """NVML, initialised, and its handle of the GPU that this process computes with; None while it uses none.

    ImportError, or what NVML raises, where it cannot be had.
    """
    import torch

    if not torch.cuda.is_initialized():
        return None
    nvml = _imported(PACKAGES)
    nvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())


def _imported(packages: Sequence[str]) -> Any:
    for name in packages:
        with suppress(ImportError):
            return importlib.import_module(name)
    raise ImportError(f"none of {', '.join(packages)} is installed")


class Gpus:
    """This machine's GPUs, as long as NVML answers; `find` is asked until it has found them, or raises."""

    def __init__(self, find: Callable[[], tuple[Any, Any] | None] = found) -> None:
        self._find = find
        self._found: tuple[Any, Any] | None = None
        self._silent = False

    def there(self) -> bool:
        """Whether this process uses a GPU of which NVML tells."""
        if self._found is None and not self._silent:
            try:
                self._found = self._find()
            except Exception:  # of what kind depends on the package
                self._silent = True
        return self._found is not None

    def busy(self) -> float | None:
        """The share of NVML's last period in which a kernel ran on this process's GPU."""
        if not self.there() or self._found is None:
            return None
        nvml, handle = self._found
        try:
            return nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        except Exception:  # as for a part of a GPU (MIG)
            self._found, self._silent = None, True
            return None

    def memory(self) -> dict[int, float]:
        """MiB of all GPUs that each process uses, by its id; those of another container have ids of theirs."""
        used: dict[int, float] = {}
        if not self.there() or self._found is None:
            return used
        nvml, _ = self._found
        with suppress(Exception):
            for index in range(nvml.nvmlDeviceGetCount()):
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(index)):
                    used[process.pid] = used.get(process.pid, 0.0) + (process.usedGpuMemory or 0) / MIB
        return used
