"""One writer a folder: a lock that the kernel gives back however its process ends, in a file that says who holds it.

The lock is of the process (fcntl), also over NFS: a child that was forked does not keep it. On a file system without
locks there is none, and a warning says so.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path

from transfer.agreement.shown import one_line

LOG = logging.getLogger(__name__)
NAME = ".writer"
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # of some network file systems
TAKEN = {errno.EACCES, errno.EAGAIN}
SAID = 200  # bytes that a holder says of itself
_held: set[tuple[int, int]] = set()  # lock files of this process, by device and inode: such a lock does not exclude it


class FolderLock:
    """Held from its making to `close`; ValueError that says who holds the folder, and for the `key` to change."""

    def __init__(self, folder: Path, key: str) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        inode = _inode(folder / NAME)
        if inode in _held:  # opening and closing it once more would end the lock
            raise ValueError(_taken(folder, key, "this process"))
        fd = os.open(folder / NAME, flags, 0o600)
        try:
            locked = _lock(fd, folder, key)
        except BaseException:
            os.close(fd)
            raise
        held = os.fstat(fd)
        self._inode = held.st_dev, held.st_ino
        if locked:
            _held.add(self._inode)
        self.close = weakref.finalize(self, _release, fd, self._inode, os.getpid())


def _lock(fd: int, folder: Path, key: str) -> bool:
    """Whether it is locked; False where the file system cannot."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            raise ValueError(_taken(folder, key, one_line(os.pread(fd, SAID, 0).decode(errors="replace")))) from None
        if error.errno not in NO_LOCKS:
            raise
        LOG.warning("%s cannot be locked (%s): see to it that nothing else writes there", folder, error.strerror)
        return False
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError):  # a full disk, say: the lock holds, without a name
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
    return True


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _taken(folder: Path, key: str, who: str) -> str:
    return f"{folder} is written by {who or 'another process'}: end that first, or set {key} to another folder"


def _release(fd: int, inode: tuple[int, int], pid: int) -> None:
    """Give it back; in a forked child nothing is to be given."""
    if os.getpid() == pid:
        _held.discard(inode)
        os.close(fd)
