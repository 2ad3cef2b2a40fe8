"""A one-shot trainer's word that its GPU memory holds still: a descriptor that stays open for as long as it does.

Host memory that travels by handles is sealed, and never changes. GPU memory is the trainer's own, and changes once it
has the receivers' answers or has given them up. A receiver that was stopped meanwhile, or hears late, finds out: it
looks in /proc, after it has read, whether the trainer still has the descriptor open. It is named in the first tensor's
handle beside the GPUs' UUIDs, where vLLM looks for its own UUID alone:

    {UUID: fields, "pledge": ("pledge", pid, fd, inode)}
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

KEY = "pledge"
NAME = "rlhf-pledge"
MAX_NUMBER = 2**63


class Pledge:
    """Kept from its making to `close`."""

    def __init__(self) -> None:
        self._fd: int | None = os.memfd_create(NAME, os.MFD_CLOEXEC)
        self.claim = (KEY, os.getpid(), self._fd, os.fstat(self._fd).st_ino)

    def close(self) -> None:
        """The memory may change from now on."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def pledge_of(handles: Sequence[Any]) -> tuple[int, int, int] | None:
    """The process, descriptor and inode that these handles name; None if they name none, ValueError if that is none."""
    first = handles[0] if handles else None
    claim = first.get(KEY) if isinstance(first, Mapping) else None
    if claim is None:
        return None
    numbers = list(claim)[1:] if isinstance(claim, tuple | list) and len(claim) == 4 and claim[0] == KEY else []
    if len(numbers) != 3 or not all(type(n) is int and 0 <= n < MAX_NUMBER for n in numbers):
        raise ValueError(f"a handle's pledge must be ({KEY!r}, process, descriptor, inode)")
    pid, fd, inode = numbers
    return pid, fd, inode


def check_kept(pledge: tuple[int, int, int] | None) -> None:
    """ValueError unless the trainer, if it has given its word, still keeps it: then what was read before is whole."""
    if pledge is None:
        return
    pid, fd, inode = pledge
    path = f"/proc/{pid}/fd/{fd}"
    try:
        kept = os.readlink(path) == f"/memfd:{NAME} (deleted)" and os.stat(path).st_ino == inode
    except OSError:
        kept = False
    if not kept:
        raise ValueError(
            f"the trainer, process {pid}, has gone on before its weights were read, or cannot be seen from here: they "
            "may have changed meanwhile"
        )
