"""What one process did with weights, a JSON line an event: the evidence that a run served what it had published.

    {"t": 8123.4, "who": "worker-0", "boot": "9f1c", "op": "finish", "epoch": 1, "version": 3, "digest": "...",
     "result": "done"}

`t` is time.monotonic, which all processes of a machine share; `boot` names one start of one process, so that a
restarted worker is another one. Lines are written at once, so that a killed process leaves all it did.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

LOG = logging.getLogger(__name__)


class Journal:
    """Appends to the file at `path`, whose name tells who writes; without one it keeps nothing."""

    def __init__(self, path: Path | None = None) -> None:
        self._who = "" if path is None else path.stem
        self._boot = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._before = "\n" if _ends_within_a_line(path) else ""
            self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()

    def write(self, op: str, **fields: Any) -> None:
        """Note one event."""
        if self._file is None:
            return
        line = json.dumps({"t": time.monotonic(), "who": self._who, "boot": self._boot, "op": op, **fields}) + "\n"
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(self._before + line)
                self._before = ""
            except OSError as error:  # a full disk, say: what is noted is not worth what is done
                LOG.warning("the journal %s ends here: %s", self._file.name, error)
                self._end()

    def close(self) -> None:
        """Close the file; later events are dropped."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what is still buffered finds no room either
                self._file.close()
        self._file = None


def _ends_within_a_line(path: Path) -> bool:
    """Whether whoever wrote the file before was killed in the middle of a line."""
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        return False  # no file yet, or an empty one
