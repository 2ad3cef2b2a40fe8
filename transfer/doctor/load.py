"""How busy the machine is, so that what merely had to wait is not called broken; standard library only.

The kernel counts the time in which a thread could have run and had no processor (/proc/PID/task/*/schedstat), and that
in which this was so of any (/proc/pressure/cpu). Where it tells neither, nothing has waited.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PATIENCE = "DOCTOR_PATIENCE"  # environment variable: what every deadline inside a check is multiplied with
MOST = 4.0  # times as long as on an idle machine
BUSY = 0.25  # of the time, from which a deadline that has passed proves nothing


def patient(seconds: float) -> float:
    """A deadline inside a check, as long as this machine needs it."""
    return seconds * float(os.environ.get(PATIENCE, "1"))


def patience() -> float:
    """How much longer than on an idle machine everything may take, by the load of the last 10 seconds; 1 to MOST."""
    return 1.0 + (MOST - 1.0) * _pressure("avg10") / 100


def waited_s(processes: Iterable[int]) -> float:
    """Seconds that these processes have waited for a processor since they began, of each its longest-waiting thread."""
    return sum(max(_delays(process), default=0) for process in processes) / 1e9


def _delays(process: int) -> list[int]:
    found = []
    with suppress(OSError):  # it ends meanwhile
        for thread in os.listdir(f"/proc/{process}/task"):
            with suppress(OSError, ValueError, IndexError):
                found.append(
                    int(Path(f"/proc/{process}/task/{thread}/schedstat").read_text(encoding="utf-8").split()[1])
                )
    return found


class Since:
    """The load from now on."""

    def __init__(self) -> None:
        self._began, self._total = time.monotonic(), _pressure("total")

    @property
    def busy(self) -> bool:
        """Whether some process has waited for a processor in much of the time since."""
        waited_s = (_pressure("total") - self._total) / 1e6
        return waited_s > BUSY * (time.monotonic() - self._began)


def _pressure(field: str) -> float:
    """A field of the kernel's line about time in which some process waited; 0 where there is none."""
    with suppress(OSError, ValueError, StopIteration):
        words = Path("/proc/pressure/cpu").read_text(encoding="utf-8").splitlines()[0].split()
        return float(next(word for word in words if word.startswith(f"{field}=")).partition("=")[2])
    return 0.0
