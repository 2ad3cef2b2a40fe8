"""The GPUs of a run: which they are, and what all processes together hold of their memory."""

from __future__ import annotations

import gc
import subprocess
from contextlib import suppress
from datetime import date
from typing import Any

import torch

from transfer.bench.shapes import BenchError

SPARE_BYTES = 4 * 2**30  # of a GPU: two processes' contexts, and packed buffers
DRIVER_S = 10.0  # deadline of asking for the driver's version


class Gpus:
    """The sender's GPU and the receiver's, which may be one and the same."""

    def __init__(self, sender: str, receiver: str) -> None:
        self.sender, self.receiver = torch.device(sender), torch.device(receiver)
        self.same = self.sender == self.receiver

    def synchronize(self) -> None:
        """Wait for all that this process has queued on either."""
        for device in {self.sender, self.receiver}:
            torch.cuda.synchronize(device)

    def release(self) -> None:
        """Give back all memory that this process holds without need."""
        gc.collect()
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()

    def used(self) -> int:
        """The bytes that all processes together hold of both GPUs."""
        return sum(total - free for free, total in map(torch.cuda.mem_get_info, {self.sender, self.receiver}))

    def free(self, device: torch.device) -> int:
        """The bytes that can be had."""
        return torch.cuda.mem_get_info(device)[0]

    def lacks(self, nbytes: int, copies: tuple[float, float]) -> str:
        """Why so many copies of `nbytes`, on the sender's GPU and on the receiver's, cannot be had; '' if they can."""
        needs = [(self.sender, copies[0] + copies[1])]
        if not self.same:
            needs = [(self.sender, copies[0]), (self.receiver, copies[1])]
        for device, count in needs:
            needed, free = count * nbytes + SPARE_BYTES, self.free(device)
            if needed > free:
                return f"needs {needed / 1e9:.1f} GB of {device}'s memory, and {free / 1e9:.1f} GB are free"
        return ""


def found(sender: str, receiver: str) -> Gpus:
    """The two GPUs; BenchError unless torch sees both."""
    if not torch.cuda.is_available():
        raise BenchError(f"--device {sender}: torch {torch.__version__} sees no CUDA device here")
    count = torch.cuda.device_count()
    for option, name in (("--device", sender), ("--receiver", receiver)):
        if (torch.device(name).index or 0) >= count:
            raise BenchError(
                f"{option} {name}: torch sees {count} CUDA device{'s' * (count > 1)} here, cuda:0 the first"
            )
    if sender != receiver and not torch.cuda.can_device_access_peer(sender, receiver):
        raise BenchError(f"--receiver {receiver}: it has no peer access to {sender}")
    torch.cuda.set_device(sender)
    return Gpus(sender, receiver)


class Meter:
    """The GPU memory that all processes have come to hold since `zero`."""

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus
        self._before = 0

    def zero(self) -> None:
        """Count from here on."""
        self._gpus.release()
        self._before = self._gpus.used()

    def extra(self) -> int:
        """The bytes that have been added."""
        return self._gpus.used() - self._before


def machine(gpus: Gpus) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": date.today().isoformat(),
        "gpus": [f"{device}: {torch.cuda.get_device_name(device)}" for device in (gpus.sender, gpus.receiver)],
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str:
    """The NVIDIA driver's version."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_S, check=True)
        if lines := answer.stdout.split():
            return lines[0]
    return "unknown"
