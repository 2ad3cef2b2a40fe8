"""What one rank of a trainer with sharded weights sends by `gloo` or `nccl`: its rows of the version written last.

A push reads them until it is over. What is asked for later, for a worker that was started again, is read in a thread
beside whatever this rank does; the worker compares it with the digest, and no such reading outlasts the next push.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from transfer.agreement.manifest import ALIGNMENT, Manifest, round_up
from transfer.backends.base import Weights
from transfer.backends.buckets import Packer, Share, begin_in, most_bytes, shares_of
from transfer.backends.collective import gpu_of
from transfer.backends.group_ends import RankGroup
from transfer.backends.hold import Hold
from transfer.backends.process_group import DEPTH, Group
from transfer.backends.rank_calls import Answering, Say
from transfer.backends.rank_rows import RowsOfRank
from transfer.backends.slots import begin_of
from transfer.config import CollectiveConfig, Library
from transfer.memory import regions
from transfer.memory.digest import digest_of
from transfer.memory.finite import not_finite
from transfer.memory.sums import SUMS, added


class CollectiveShards:
    """What rank `number` of `count` holds and sends."""

    socket = None  # nothing is mapped

    def __init__(self, config: CollectiveConfig, number: int, count: int) -> None:
        self._config = config
        self._rows = RowsOfRank(number, count)
        self._manifest = Manifest((), 0)
        self._begin = 0  # of its rows in sums over those of all ranks, bytes
        self._device = self._home = torch.device("cpu")  # that the library moves bytes between; where the rows lie
        self._size = 0  # of a bucket, bytes
        self._memory: list[torch.Tensor] = []
        self._shares: tuple[int, list[Share]] = 0, []
        self._version: int | None = None
        self._held: dict[str, torch.Tensor] = {}
        self._hold = Hold()  # of the version written last, until its push is over
        self._late = Hold()  # of what reads it afterwards, until the next push
        self._group: RankGroup | None = None
        self._answering: Answering | None = None

    def carry_out(self, step: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        """This rank's part of a step: of `write` the first tensor here that is not finite, `bad`."""
        match step["do"]:
            case "prepare":
                return self._prepare(step, weights)
            case "write":
                return self._write(step["version"], weights)
        return {}

    def release(self) -> None:
        """No row is read any more for the push, or for what came before it."""
        self._hold.end()
        self._late.end()
        self._synchronize()

    def close(self) -> None:
        """Answer the first rank no more, and leave the group."""
        if self._answering is not None:
            self._answering.close()
        self._answering = None
        self._leave()
        self._memory, self._held = [], {}

    def _prepare(self, step: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        self.close()
        rank, count = self._rows.number, self._rows.count
        if rank:
            self._answering = Answering(step["calls"], rank, self._act)
        self._manifest, self._size = Manifest.from_json(step["manifest"]), step["size"]
        self._rows.prepare(self._manifest, step["whole"], weights)
        self._begin = begin_of(self._manifest, count, rank, step["whole"])
        self._shares, self._version = (0, []), None
        self._home = next((tensor.device for tensor in weights.values() if tensor.is_cuda), torch.device("cpu"))
        if self._config.library is Library.nccl:
            self._device = gpu_of(weights)
        self.allocate()
        return {
            "on_gpu": self._home.type == "cuda",
            "gpu": regions.device_uuid(self._device) if self._device.type == "cuda" else None,
        }

    def allocate(self) -> None:
        """Other buffers than those from which a broadcast that was given up may still be sent."""
        size = min(self._size, max(ALIGNMENT, round_up(self._manifest.nbytes, ALIGNMENT)))
        self._memory = [torch.zeros(size, dtype=torch.uint8, device=self._device) for _ in range(DEPTH)]

    def _write(self, version: int, weights: Weights) -> dict[str, Any]:
        held = self._rows.held(weights)
        if (bad := not_finite(held, self._rows.layout)) is None:
            self._held, self._version, self._hold = held, version, Hold()
        return {"bad": bad}

    # --- what is sent -------------------------------------------------------------------------------------------------

    def shares(self, size: int) -> list[Share]:
        """What all ranks send, in order, in buckets of this size."""
        if self._shares[0] != size:
            count, whole = self._rows.count, self._rows.whole
            self._shares = size, shares_of(self._manifest, size, count, whole)
        return self._shares[1]

    def packer(self, version: int, late: bool) -> Packer:
        """What copies this rank's rows; `late`: the version's push is over. ConnectionAbortedError for another one."""
        if version != self._version:
            raise ConnectionAbortedError(f"it does not hold version {version}")
        self._synchronize()
        if late:
            self._late.end()
            self._late = Hold()
        ranks, rank, whole = self._rows.count, self._rows.number, self._rows.whole
        return Packer(
            self._held,
            self._late if late else self._hold,
            lambda entry: 0 if entry.name in whole or not entry.shape else begin_in(entry, ranks, rank),
        )

    def broadcast(self, group: Group, packer: Packer, size: int, timeout_s: float) -> None:
        """This rank's part in a broadcast of all rows; ConnectionError: it was ended elsewhere."""
        shares, failed = self.shares(size), ""

        def tensor(index: int) -> torch.Tensor:
            nonlocal failed
            share, buffer = shares[index], self._memory[index % DEPTH]
            if share.rank == self._rows.number:
                try:
                    packer.pack(share.pieces, buffer)
                except RuntimeError as error:
                    failed = f"its rows cannot be sent: {error}"
                    raise
            return buffer[: share.nbytes]

        try:
            group.broadcast(timeout_s, len(shares), tensor, root=lambda index: shares[index].rank)
        except ConnectionError as error:
            raise (OSError(failed) if failed else error) from None

    @torch.no_grad()
    def sums(self, version: int) -> str:
        """Of this rank's rows, in the dtype that travels, about a bucket at a time."""
        if version != self._version:
            raise ConnectionAbortedError(f"it does not hold version {version}")
        self._synchronize()
        found, parts, places, entries = [], [], [], self._rows.layout.by_name
        for name, tensor in self._held.items():
            parts.append(tensor.to(entries[name].torch_dtype))
            places.append(self._begin + entries[name].offset)
            if sum(part.nbytes for part in parts) >= self._size:
                found.append(digest_of(parts, SUMS, places))
                parts, places = [], []
        return added([*found, digest_of(parts, SUMS, places)])

    def _synchronize(self) -> None:
        """What is queued may write the weights, or read them."""
        for device in {tensor.device for tensor in self._held.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)

    # --- beside the first rank ----------------------------------------------------------------------------------------

    def _act(self, request: Mapping[str, Any], say: Say) -> dict[str, Any]:
        """What the first rank asks for."""
        with torch.cuda.device(self._home) if self._home.type == "cuda" else nullcontext():
            match request["do"]:
                case "send":
                    self._send(request)
                case "rows":
                    self._say_rows(request, say)
                case "sums":
                    return {"sums": self.sums(request["version"])}
        return {}

    def _send(self, request: Mapping[str, Any]) -> None:
        where, library, host = request["where"], self._config.library, self._config.host
        packer = self.packer(request["version"], request["late"])
        if self._group is None or not self._group.usable or self._group.named != (where["port"], where["nonce"]):
            if self._group is not None and not self._group.usable:
                self.allocate()
            self._leave()
            self._group = RankGroup(library, self._device, host, where, self._rows.number)
        self.broadcast(self._group, packer, request["size"], request["timeout_s"])

    def _say_rows(self, request: Mapping[str, Any], say: Say) -> None:
        packer, shares = self.packer(request["version"], request["late"]), self.shares(request["size"])
        room = torch.empty(most_bytes(shares), dtype=torch.uint8)
        for share in shares:
            if share.rank == self._rows.number:
                packer.pack(share.pieces, room)
                say({}, room[: share.nbytes])

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None
