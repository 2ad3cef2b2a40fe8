"""Folders that are there whole or not at all: written aside, flushed, named last; none is believed before it verifies.

    00000012/               what was saved after step 12
        ...                 files, of whoever writes them
        manifest.json       {"step", "files": {path: {"bytes", "sha256"}}}; written last
    best.json               {"step", "score"} of the best evaluation so far
    .writing-XXXX           begun and not ended
    .removing-XXXX          on its way out

Killed at any moment, or with any call failing, what was saved before stays and verifies. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
BEST = "best.json"
WRITING, REMOVING = ".writing-", ".removing-"
CHUNK = 2**20  # bytes that are hashed at once


@dataclass(frozen=True, slots=True)
class Best:
    """The evaluation with the highest score."""

    step: int
    score: float


class Store:
    """The checkpoints in `folder`, by the step after which each was saved; one process at a time writes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: dict[int, str] = {}  # what `newest` has passed over, and why

    def steps(self) -> list[int]:
        """Of all checkpoints that have a name, in order; whether they verify is another question."""
        return sorted(int(path.name) for path in self.folder.glob("[0-9]" * 8))

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / f"{step:08d}"

    def newest(self) -> int | None:
        """The step of the newest checkpoint that verifies; None if none does."""
        self.damaged = {}
        for step in reversed(self.steps()):
            fault = fault_of(self.path(step), step)
            if fault is None:
                return step
            self.damaged[step] = fault
        return None

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """A checkpoint of the files that `write` puts into the folder it is given.

        After an OSError, or another error of `write`, all earlier ones are as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tidy()
        writing = self._aside(WRITING)
        try:
            writing.mkdir()
            write(writing)
            _seal(writing, step)
            if self.path(step).exists():
                self._remove(self.path(step))
            os.rename(writing, self.path(step))
            flush(self.folder)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise

    def keep_only(self, steps: Collection[int]) -> None:
        """Remove all other checkpoints; what cannot be removed now is removed later."""
        for step in self.steps():
            if step not in steps:
                with suppress(OSError):
                    self._remove(self.path(step))

    def best(self) -> Best | None:
        """The best evaluation so far; None where there is none, or its checkpoint is gone."""
        try:
            found = json.loads((self.folder / BEST).read_text(encoding="utf-8"))
            best = Best(int(found["step"]), float(found["score"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return best if self.path(best.step).is_dir() else None

    def note_best(self, best: Best) -> None:
        """Remember the best evaluation; OSError leaves the one before."""
        writing = self._aside(WRITING)
        _write(writing, json.dumps({"step": best.step, "score": best.score}))
        os.replace(writing, self.folder / BEST)
        flush(self.folder)

    def tidy(self) -> None:
        """Remove what a process that was killed has left half-written or half-removed."""
        for prefix in (WRITING, REMOVING):
            for path in self.folder.glob(f"{prefix}*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        path.unlink()

    def _remove(self, path: Path) -> None:
        """Take the name first, so that no checkpoint is ever there in part."""
        removing = self._aside(REMOVING)
        os.rename(path, removing)
        shutil.rmtree(removing, ignore_errors=True)

    def _aside(self, prefix: str) -> Path:
        return self.folder / f"{prefix}{secrets.token_hex(4)}"


def fault_of(path: Path, step: int) -> str | None:
    """Why the checkpoint of `step` in this folder does not verify; None if it does."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = dict(manifest["files"])
        if manifest["step"] != step:
            return f"{MANIFEST}: it is of step {manifest['step']}"
        for name, told in files.items():
            if _described(path / name) != told:
                return f"{name}: not the bytes that were written"
    except OSError as error:
        return f"{error.filename and Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST}: it cannot be read"
    return None


def _seal(folder: Path, step: int) -> None:
    """Flush all that is below the folder, and describe it in the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        flush(path)
    for path in [path for path in folder.rglob("*") if path.is_dir()]:
        flush(path)
    described = {path.relative_to(folder).as_posix(): _described(path) for path in files}
    _write(folder / MANIFEST, json.dumps({"step": step, "files": described}, indent=1) + "\n")
    flush(folder)


def _described(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Let a file's bytes, or a folder's names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
