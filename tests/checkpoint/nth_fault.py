"""The N-th call that changes the disk fails, or the process ends there; imports no torch."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CALLS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")  # of the module os


class Nth:
    """Counts calls; at the n-th does `harm`, which raises or ends the process."""

    def __init__(self, n: int, harm: Callable[[str], Any]) -> None:
        self.n, self.harm, self.calls = n, harm, 0
        self.names: list[str] = []

    def __call__(self, name: str) -> None:
        self.calls += 1
        self.names.append(name)
        if self.calls == self.n:
            self.harm(name)

    @property
    def came(self) -> bool:
        """Whether there were so many calls."""
        return self.calls >= self.n


def no_space(name: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", name)


class File:
    """A file open for writing, whose writes are counted; one that fails has written half."""

    def __init__(self, file: Any, nth: Nth) -> None:
        self._file, self._nth = file, nth

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: Any) -> int:
        self._file.write(text[: len(text) // 2])
        self._nth("write")
        return self._file.write(text[len(text) // 2 :])

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)


@contextmanager
def failing(nth: Nth) -> Iterator[None]:
    """Every call that changes the disk counts; nothing reaches a disk, as SIGKILL and ENOSPC do not care for it."""
    plain = {name: getattr(os, name) for name in CALLS}
    opened = io.open

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nth(name)
            return None if name == "fsync" else plain[name](*arguments, **options)

        return call

    def opens(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return opened(file, mode, *arguments, **options)
        nth("create")
        return File(opened(file, mode, *arguments, **options), nth)

    try:
        for name in CALLS:
            setattr(os, name, counted(name))
        io.open = builtins.open = opens  # type: ignore[assignment]
        yield
    finally:
        for name in CALLS:
            setattr(os, name, plain[name])
        io.open = builtins.open = opened
