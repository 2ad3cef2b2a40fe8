"""Backend `disk`: one safetensors file and one JSON manifest a version, in a folder that both sides see.

    00000003-00000007.safetensors   version 7 of the trainer with epoch 3: the tensors under their entry names
    00000003-00000007.json          {"epoch", "version", "bytes", "xxh3_128", "manifest"}; written last: without it
                                    there is no version
    .writer                         who writes into the folder: one process at a time (folder_lock.py)

Each is written under a temporary name, flushed to the disk and renamed. A trainer that was replaced, and does not know
it yet, writes under names of its own. A reader makes the file names from its own folder and these two numbers alone,
follows no links, opens nothing but regular files, reads no more than was announced, and believes a file only if its
hash is the one the trainer sent.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from transfer.agreement import wire
from transfer.agreement.manifest import Manifest
from transfer.agreement.shards import is_names, is_ranks
from transfer.agreement.shown import shown
from transfer.backends.folder_lock import FolderLock
from transfer.config import DiskConfig
from transfer.memory.digest import digest_of

WEIGHTS = "weights"  # in a run's folder, where transfer.path is not set
FILES = re.compile(r"(\d{8,}-)?\d{8,}(-\d{5,}-of-\d{5,})?\.(json|safetensors)")  # there were names without an epoch
ABANDONED_S = 3600.0  # the write of a version takes less
MAX_RECORD_BYTES = 64 * 2**20  # of the JSON file, and of what a safetensors file holds beside its tensors


class DiskPublisher:
    """The sending half: writes a version, then removes its own that are neither served nor among the newest."""

    casts = True
    keeps = True
    finds_nonfinite = False
    takes_shards = False
    exposes = False
    given: tuple[torch.Tensor, ...] = ()

    def __init__(self, config: DiskConfig, folder: Path) -> None:
        self._folder, self._lock = _held(folder_of(config, folder))
        self._keep = config.keep
        self._manifest: Manifest | None = None
        self._epoch = 0
        self._written: dict[int, int] = {}  # the epoch in which a version was written, in the order of writing
        self.endpoint: dict[str, Any] = {"backend": "disk", "folder": str(self._folder)}

    def prepare(self, manifest: Manifest, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Remember the manifest, and remove what trainers that were killed long ago have left half-written."""
        for folder in self._folder.glob(".writing-*"):
            with suppress(OSError):  # its trainer lives, and has ended the write meanwhile
                if time.time() - folder.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(folder)
        self._manifest = manifest
        return {}

    def fence(self, epoch: int) -> None:
        """Write under names of this epoch from now on."""
        self._epoch = epoch

    @torch.no_grad()
    def write(
        self, version: int, weights: Mapping[str, torch.Tensor], served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]:
        """Write one version; the file's names, size and hash, and the digest of the tensors."""
        assert self._manifest is not None
        data = {e.name: on_host(weights[e.name], e.torch_dtype) for e in self._manifest.entries}
        size, file_hash = write_file(self._folder, _weights_name(self._epoch, version), data)
        self._record(version, {"bytes": self._manifest.nbytes, "xxh3_128": file_hash}, served)
        told = {"epoch": self._epoch, "bytes": size, "xxh3_128": file_hash}
        return told, digest_of(data.values()) if with_digest else None

    def _record(self, version: int, files: Mapping[str, Any], served: Collection[int]) -> None:
        """Write what makes the version be one, now that its `files` are there; and remove older ones."""
        assert self._manifest is not None
        record = {"epoch": self._epoch, "version": version, **files, "manifest": self._manifest.to_json()}
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=self._folder) as temporary:
            path = Path(temporary) / "record"
            path.write_text(json.dumps(record), encoding="utf-8")
            _publish(path, self._folder, _record_name(self._epoch, version))
        if self._written.get(version, self._epoch) != self._epoch:  # nobody was told to finish that one
            self._remove(version)
        self._written.pop(version, None)
        self._written[version] = self._epoch
        self._remove_old({*served, *list(self._written)[-self._keep :]})

    def release(self) -> None:
        """Nothing: the files are copies."""

    def close(self) -> None:
        """Give the folder back; the last versions stay, for whoever comes late."""
        self._lock.close()

    def _remove_old(self, kept: Collection[int]) -> None:
        for version in [v for v in self._written if v not in kept]:
            self._remove(version)

    def _remove(self, version: int) -> None:
        for name in self._names(self._written.pop(version), version):
            (self._folder / name).unlink(missing_ok=True)

    def _names(self, epoch: int, version: int) -> list[str]:
        """Of all files that a version may have, the record's first."""
        return [_record_name(epoch, version), _weights_name(epoch, version)]


def remove_versions(folder: Path) -> None:
    """Remove what trainers that have ended have left in a run's `weights/`, and nothing else that is there."""
    for path in (folder / WEIGHTS).glob("*"):
        if FILES.fullmatch(path.name):
            path.unlink(missing_ok=True)


class DiskIntake:
    """The receiving half: reads a version into memory of its own, on the module's device."""

    in_place = False
    settled = True
    unchecked = False
    slots: Sequence[dict[str, torch.Tensor]] = ()
    owner = torch.device("cpu")

    def __init__(self, endpoint: Mapping[str, Any]) -> None:
        self._folder = str(endpoint["folder"])
        self._manifest: Manifest | None = None
        self._ranks, self._whole = 1, list[str]()  # of the trainer, and what they have alike, where they hold shards
        self._device = torch.device("cpu")

    def prepare(self, manifest: Manifest, where: Mapping[str, Any], device: torch.device) -> None:
        """Remember what a version must hold."""
        wire.only(dict(where), PREPARED, "where")
        self._ranks, self._whole = where.get("ranks", 1), list(where.get("whole", ()))
        if unknown := sorted({*self._whole} - {entry.name for entry in manifest.entries}):
            raise ValueError(f"where.whole names tensors that are not in the manifest: {shown(unknown)}")
        self._manifest, self._device = manifest, device

    def stage(self, version: int, where: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Read and check one version; ValueError if the files are not the ones that the trainer wrote."""
        wire.only(dict(where), WHERE, "where")
        assert self._manifest is not None
        epoch, files = where.get("epoch", 0), where.get("files")
        if (files is None) is (self._ranks > 1) or (files is not None and len(files) != self._ranks):
            raise ValueError(f"where.files must be {self._ranks} if the trainer has several ranks, else be left out")
        name = _record_name(epoch, version)
        record = wire.loads(_read(self._folder, name, MAX_RECORD_BYTES), MAX_RECORD_BYTES)
        described = record.get("epoch"), record.get("version")
        if described != (epoch, version) or Manifest.from_json(record.get("manifest")) != self._manifest:
            raise ValueError(f"{name} describes other weights than were agreed on")
        if files is not None:
            return self._joined((epoch, version), files)
        name, told = _weights_name(epoch, version), (where.get("bytes", 0), where.get("xxh3_128", ""))
        found = read_file(self._folder, name, self._manifest.nbytes, *told)
        _check(found, self._manifest)
        return {entry.name: found[entry.name].to(self._device) for entry in self._manifest.entries}

    def _joined(self, at: tuple[int, int], files: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """All rows of each tensor, put together here."""
        from transfer.backends.disk_shards import read_rows

        assert self._manifest is not None
        held = read_rows(self._folder, at, files, self._manifest, self._whole)
        joined = {}
        for entry in self._manifest.entries:
            parts = [of_rank[entry.name] for of_rank in held if entry.name in of_rank]
            empty = torch.empty(entry.shape, dtype=entry.torch_dtype)
            whole = (parts[0] if len(parts) == 1 else torch.cat(parts)) if parts else empty
            joined[entry.name] = whole.to(self._device)
        return joined

    def still(self, version: int) -> bool:
        """Always: what is staged is the worker's own."""
        return True

    def close(self) -> None:
        """Nothing is held open."""


def _held(folder: Path) -> tuple[Path, FolderLock]:
    """The folder, made and locked; ValueError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        return folder, FolderLock(folder, "transfer.path")
    except OSError as error:
        why = f"got {str(folder)!r}; {error.strerror}: {error.filename}"
        raise ValueError(f"transfer.path must be a folder that can be written to ({why})") from error


def _weights_name(epoch: int, version: int) -> str:
    return f"{epoch:08d}-{version:08d}.safetensors"


def _record_name(epoch: int, version: int) -> str:
    return f"{epoch:08d}-{version:08d}.json"


def rows_name(epoch: int, version: int, rank: int, count: int) -> str:
    """The file with a rank's rows of a version."""
    return f"{epoch:08d}-{version:08d}-{rank + 1:05d}-of-{count:05d}.safetensors"


def folder_of(config: DiskConfig, folder: Path) -> Path:
    """Where versions are, of a run in this folder."""
    return Path(config.path) if config.path else folder / WEIGHTS


def on_host(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor as a file holds it."""
    return tensor.detach().to("cpu", dtype).contiguous()


def write_file(folder: Path, name: str, data: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """Write a safetensors file whole, or not at all; its bytes and hash. OSError if it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as temporary:
        path = Path(temporary) / "weights"
        try:
            save_file(dict(data), path)
        except SafetensorError as error:  # a full disk, say: its Rust half raises no OSError
            raise OSError(str(error)) from error
        told = path.stat().st_size, _hash(path.read_bytes())
        _publish(path, folder, name)
    return told


def read_file(folder: str, name: str, nbytes: int, size: int, file_hash: str) -> dict[str, torch.Tensor]:
    """The tensors, of `nbytes`, in a file that was announced with this size and hash; ValueError if it is another."""
    from safetensors.torch import load

    most = nbytes + MAX_RECORD_BYTES
    if size > most:
        raise ValueError(f"{name} is announced with {size:,} bytes, more than its weights can have ({most:,})")
    raw = _read(folder, name, size)
    if len(raw) != size or _hash(raw) != file_hash:
        raise ValueError(f"{name} is damaged: its hash is not the one that the trainer sent")
    found: dict[str, torch.Tensor] = load(raw)
    return found


def _publish(temporary: Path, folder: Path, name: str) -> None:
    _flush(temporary, os.O_RDONLY)
    temporary.replace(folder / name)
    _flush(folder, os.O_RDONLY | os.O_DIRECTORY)


def _hash(raw: bytes) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(raw)


def _flush(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(folder: str, name: str, most: int) -> bytes:
    """A regular file's bytes; OSError if it, or the folder, is a link, ValueError if there are more than `most`."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISLNK(found.st_mode):  # of a link the error is open's
            _check_file(name, found, most)  # before it is opened: to open a device may have effects
        fd = os.open(name, flags, dir_fd=directory)
    finally:
        os.close(directory)
    with open(fd, "rb") as file:
        _check_file(name, os.fstat(fd), most)
        return file.read(most)


def _check_file(name: str, found: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{name} must be a regular file")
    if found.st_size > most:
        raise ValueError(f"{name} has {found.st_size:,} bytes, more than were announced ({most:,})")


def _check(found: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
    held = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
    if held != {entry.name: (entry.torch_dtype, entry.shape) for entry in manifest.entries}:
        raise ValueError("the file holds other tensors than its manifest says")


def _are_files(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict)
        and each.keys() == {"bytes", "xxh3_128"}
        and wire.is_int(each["bytes"])
        and wire.is_str(each["xxh3_128"])
        for each in value
    )


PREPARED: dict[str, Callable[[Any], bool]] = {"ranks": is_ranks, "whole": is_names}
WHERE: dict[str, Callable[[Any], bool]] = {  # of an update
    "epoch": wire.is_int,
    "bytes": wire.is_int,
    "xxh3_128": wire.is_str,
    "files": _are_files,
}
