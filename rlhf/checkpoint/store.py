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

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

FOLDER = "checkpoints"  # of a run
MANIFEST = "manifest.json"
BEST = "best.json"
WRITING, REMOVING = ".writing-", ".removing-"
CHUNK = 2**20  # bytes that are hashed at once
MOST_JSON = 2**26  # bytes of a file of JSON: state.json has some of each row of the task


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

    def newest(self, fault_in: Callable[[Path], str | None] = lambda path: None) -> int | None:
        """The step of the newest checkpoint that verifies, in which `fault_in` finds nothing; None: there is none."""
        self.damaged = {}
        for step in reversed(self.steps()):
            fault = fault_of(self.path(step), step) or fault_in(self.path(step))
            if fault is None:
                return step
            self.damaged[step] = fault
        return None

    def save(self, step: int, write: Callable[[Path], Mapping[str, Any] | None]) -> None:
        """A checkpoint of the files that `write` puts into the folder it is given; it says which it has described.

        After an OSError, or another error of `write`, all earlier ones are as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tidy()
        writing = self._aside(WRITING)
        try:
            writing.mkdir()
            _seal(writing, step, write(writing) or {})
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
            found = read_json(self.folder / BEST)
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
    """Why the checkpoint of `step` in this folder does not verify; None if it has the very files that were written."""
    try:
        manifest = read_json(path / MANIFEST)
        files: dict[str, dict[str, Any]] = dict(manifest["files"])
        if manifest["step"] != step:
            return f"{MANIFEST}: it is of step {manifest['step']}"
        there = set(_files(path)) - {MANIFEST}
        for name, told in files.items():
            if name not in there:
                return f"{Path(name).name}: No such file or directory"
            if (path / name).stat().st_size != told["bytes"] or described(path / name) != told:
                return f"{name}: not the bytes that were written"
        if there - set(files):
            return f"{min(there - set(files))}: not what was written"
    except OSError as error:
        return f"{error.filename and Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST}: it cannot be read"
    return None


def read_json(path: Path) -> Any:
    """What a file holds; ValueError if that is no JSON, nested too deeply or too long, and OSError if it is no file."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a FIFO would have nobody to wait for
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        data = file.read(MOST_JSON + 1)
    if len(data) > MOST_JSON:
        raise ValueError(f"{path.name} has more than {MOST_JSON} bytes")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None


def _files(folder: Path, within: str = "") -> Iterator[str]:
    """The files below, by their paths from there; OSError for what is neither a file nor a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path), f"{within}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                yield f"{within}{entry.name}"
            else:
                raise OSError(errno.EINVAL, "neither a file nor a folder", entry.path)


def _seal(folder: Path, step: int, known: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Flush all that is below the folder, but what is known already, and describe it in the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    for name, path in zip(names, files, strict=True):
        if name not in known:
            flush(path)
    for path in [path for path in folder.rglob("*") if path.is_dir()]:
        flush(path)
    told = {name: known.get(name) or described(path) for name, path in zip(names, files, strict=True)}
    _write(folder / MANIFEST, json.dumps({"step": step, "files": told}, indent=1) + "\n")
    flush(folder)


def described(path: Path) -> dict[str, Any]:
    """A file as a manifest has it: its bytes and their sha256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def flushed(paths: Collection[Path]) -> dict[str, dict[str, Any]]:
    """Each file as a manifest has it, by its name, once it has reached the disk; it is read while it is written."""
    with ThreadPoolExecutor(max(1, len(paths))) as threads:
        flushing = [threads.submit(flush, path) for path in paths]
        found = {path.name: described(path) for path in paths}
        for each in flushing:
            each.result()
    return found


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
