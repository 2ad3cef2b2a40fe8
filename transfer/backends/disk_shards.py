"""Backend `disk` of a trainer of several ranks with sharded weights: each writes a file with its own rows.

    00000003-00000007-00002-of-00004.safetensors   the rows of the second of four ranks, in version 7 of epoch 3
    00000003-00000007.json                         as of whole weights (disk.py), with a size and a hash for each file;
                                                   the first rank writes it when all files are there

The folder is the first rank's to hold and to clean. The digest is that of the whole tensors, which the first rank reads
from all files: a file that another host has written is then seen here, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from transfer.agreement.dtensor import any_dtensor
from transfer.agreement.manifest import Manifest
from transfer.agreement.shards import local
from transfer.backends.base import Weights
from transfer.backends.disk import DiskPublisher, folder_of, on_host, read_file, rows_name, write_file
from transfer.backends.rank_rows import RowsOfRank, Together, not_sharded
from transfer.config import DiskConfig
from transfer.memory.digest import Hasher
from transfer.memory.finite import NotFinite, not_finite


class DiskShards:
    """What rank `number` of `count` writes."""

    socket = None  # nothing is mapped

    def __init__(self, config: DiskConfig, folder: Path, number: int, count: int) -> None:
        self._folder = folder_of(config, folder)
        self._rows = RowsOfRank(number, count)

    @torch.no_grad()
    def carry_out(self, step: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        """This rank's part of a step; of `write` its file's size and hash, or `bad`, what is not finite in it."""
        if step["do"] == "prepare":
            self._rows.prepare(Manifest.from_json(step["manifest"]), step["whole"], weights)
            return {}
        held, layout = self._rows.held(weights), self._rows.layout
        if (bad := not_finite(held, layout)) is not None:
            return {"bad": bad}
        data = {name: on_host(tensor, layout.by_name[name].torch_dtype) for name, tensor in held.items()}
        name = rows_name(step["epoch"], step["version"], self._rows.number, self._rows.count)
        size, file_hash = write_file(self._folder, name, data)
        return {"bad": None, "bytes": size, "xxh3_128": file_hash}

    def release(self) -> None:
        """Nothing is read of the weights once they are written."""

    def close(self) -> None:
        """Nothing is held open."""


class DiskShardPublisher(DiskPublisher):
    """The first rank's sending half; whole weights, which all ranks have alike, it writes alone."""

    takes_shards = True

    def __init__(self, config: DiskConfig, folder: Path, count: int, together: Together) -> None:
        super().__init__(config, folder)
        self._count = count
        self._together = together
        self._whole: list[str] | None = None  # of weights that are sharded

    def prepare(self, manifest: Manifest, weights: Weights) -> dict[str, Any]:
        """As for whole weights, in all ranks; what a worker must know to find the rows."""
        super().prepare(manifest, weights)
        self._whole, self.finds_nonfinite = None, False
        if not any_dtensor(weights.values()):
            return {}
        whole = not_sharded(manifest, weights)
        self._together({"do": "prepare", "manifest": manifest.to_json(), "whole": whole}, weights)
        self._whole, self.finds_nonfinite = whole, True
        return {"ranks": self._count, "whole": whole}

    def write(
        self, version: int, weights: Weights, served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]:
        """Let all ranks write their rows, then the record; the files' sizes and hashes, and the digest; NotFinite."""
        if self._whole is None:
            return super().write(version, weights, served, with_digest)
        assert self._manifest is not None
        try:
            found = self._together({"do": "write", "version": version, "epoch": self._epoch}, weights)
            if bad := [each["bad"] for each in found if each["bad"] is not None]:
                order = [entry.name for entry in self._manifest.entries]
                raise NotFinite(tensor=min(bad, key=order.index))
        except BaseException:  # what other ranks have written is no version
            for name in self._names(self._epoch, version):
                (self._folder / name).unlink(missing_ok=True)
            raise
        files = [{"bytes": each["bytes"], "xxh3_128": each["xxh3_128"]} for each in found]
        self._record(version, {"files": files}, served)
        told = {"epoch": self._epoch, "files": files}
        return told, self._digest(version, files) if with_digest else None

    def _names(self, epoch: int, version: int) -> list[str]:
        rows = [rows_name(epoch, version, rank, self._count) for rank in range(self._count)]
        return [*super()._names(epoch, version), *rows]

    def _digest(self, version: int, files: list[dict[str, Any]]) -> str:
        assert self._manifest is not None and self._whole is not None
        parts = read_rows(str(self._folder), (self._epoch, version), files, self._manifest, self._whole)
        hasher = Hasher()
        for entry in self._manifest.entries:
            for held in parts:
                if entry.name in held:
                    hasher.add(held[entry.name])
        return hasher.digest()


def read_rows(
    folder: str, at: tuple[int, int], files: list[dict[str, Any]], manifest: Manifest, whole: Collection[str]
) -> list[dict[str, torch.Tensor]]:
    """What each rank has written of a version, `at` (epoch, version), on the host; ValueError for other files."""
    found = []
    for rank, file in enumerate(files):
        layout = local(manifest, len(files), rank, whole)
        held = read_file(folder, rows_name(*at, rank, len(files)), layout.nbytes, file["bytes"], file["xxh3_128"])
        wanted = {entry.name: (entry.torch_dtype, entry.shape) for entry in layout.entries if entry.nbytes}
        if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()} != wanted:
            raise ValueError(f"the file of rank {rank} holds other rows than its manifest says")
        found.append(held)
    return found
