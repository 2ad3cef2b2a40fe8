"""Backends `gloo` and `nccl` of a trainer of several ranks with sharded weights: each broadcasts its own rows.

    CollectiveShards           in every rank: what it sends (collective_rows.py)
    CollectiveShardPublisher   in the first rank, for its session: lets all ranks take part

All ranks and the workers of an update are one process group; what it carries is divided by buckets, and in a bucket by
ranks (buckets.py), each sent by the rank whose rows it is. The others get it, too, into the buffer that they would pack
into, and look no further. One group for all, in place of one for each rank: it forms, and is given up, as a whole, and
NCCL never has two communicators that may be launched in another order elsewhere; the ring of a broadcast passes each
link once, so that more members take no more time.

The ranks beside the first send in a thread (rank_calls.py), for their main threads may be anywhere when a worker that
was started again needs the newest version. A push ends their reading when it ends; what a worker gets between pushes
it compares with the digest, always.

The digest of rows on the host is that of the whole tensors: the first rank hears all rows for it, a bucket at a time,
and keeps none. On GPUs it is sums, which each rank takes of its own rows, and which are added.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any

import torch

from transfer.agreement.dtensor import any_dtensor
from transfer.agreement.manifest import Manifest
from transfer.agreement.wire import TransferError
from transfer.backends.base import Part, Weights
from transfer.backends.buckets import Packer
from transfer.backends.collective import Broadcast, CollectivePublisher, gpu_of
from transfer.backends.collective_rows import CollectiveShards
from transfer.backends.group_ends import TrainerGroup
from transfer.backends.rank_calls import Calls
from transfer.backends.rank_rows import Together, not_sharded
from transfer.config import CollectiveConfig, Library
from transfer.memory.digest import Hasher
from transfer.memory.finite import NotFinite
from transfer.memory.sums import added


class RanksBroadcast(Broadcast):
    """The trainer's part of one update: that of all its ranks."""

    def run(self, timeout_s: float) -> None:
        """Broadcast, in all ranks, while the workers receive; if one of them fails it is over for all."""
        try:
            super().run(timeout_s)
        except BaseException:
            self._group.close()
            raise


class CollectiveShardPublisher(CollectivePublisher):
    """The first rank's sending half; whole weights, which all ranks have alike, it sends alone."""

    takes_shards = True

    def __init__(self, config: CollectiveConfig, shards: CollectiveShards, count: int, together: Together) -> None:
        super().__init__(config)
        self._shards = shards
        self._count = count
        self._together = together
        self._calls: Calls | None = None  # of weights that are sharded
        self._on_gpus = False
        self._late = True  # no push is under way
        self._order: dict[str, int] = {}  # of the entries

    def prepare(self, manifest: Manifest, weights: Weights) -> dict[str, Any]:
        """As for whole weights, in all ranks; what a worker must know to put rows where they belong."""
        self._drop_ranks()
        if not any_dtensor(weights.values()):
            return super().prepare(manifest, weights)
        self._drop_group()
        self._manifest, self._version = manifest, None
        whole = not_sharded(manifest, weights)
        calls = self._calls = Calls(self._config.host, self._config.sender.timeout_s)
        step = {"do": "prepare", "manifest": manifest.to_json(), "whole": whole, "size": self._size}
        found = self._together({**step, "calls": calls.where}, weights)
        try:
            calls.meet(self._count)
        except OSError as error:
            raise TransferError(f"the trainer's other ranks do not come to {self._config.host}: {error}") from error
        if len({each["on_gpu"] for each in found}) > 1:
            raise ValueError("all ranks must hold their weights on a GPU, or none of them")
        self._on_gpus, self.finds_nonfinite, self._ranks = found[0]["on_gpu"], True, self._count
        self._order = {entry.name: index for index, entry in enumerate(manifest.entries)}
        if self._config.library is Library.nccl:
            self._device = gpu_of(weights)
        devices = [each["gpu"] for each in found if each["gpu"] is not None]
        return {**self._told(devices), "ranks": self._count, "whole": whole}

    def write(
        self, version: int, weights: Weights, served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]:
        """Let all ranks look at their rows, which are sent when the workers receive them; NotFinite."""
        if self._calls is None:
            return super().write(version, weights, served, with_digest)
        self._late, self._digest = False, None
        try:
            found = self._together({"do": "write", "version": version}, weights)
            if bad := [each["bad"] for each in found if each["bad"] is not None]:
                raise NotFinite(tensor=min(bad, key=self._order.__getitem__))
            self._version = version
            self._digest = self._digest_now() if with_digest else None
        except BaseException as error:
            self._end_push()
            if isinstance(error, OSError):
                self._ask_why()
            raise
        return {"bucket": self._size}, self._digest

    def holds(self, version: int) -> bool:
        """Whether all ranks' rows are still those of this version, as far as a digest can tell."""
        with suppress(OSError):
            return super().holds(version)
        return False

    def alongside(self, version: int, takers: Sequence[Hashable]) -> Part:
        """The part of all ranks in an update to the version written last."""
        if self._calls is None:
            return super().alongside(version, takers)
        assert version == self._version, f"version {version} is not the one written last"
        group = self._group_with(takers)
        packer = self._shards.packer(version, self._late)
        request = {"do": "send", "version": version, "late": self._late, "size": self._size, "where": group.where}
        return RanksBroadcast(group, partial(self._send, self._calls, group, request, packer))

    def release(self) -> None:
        """No row is read for the update any more; TransferError, in the ranks' own words, if one of them is gone."""
        pushing = not self._late
        self._end_push()
        super().release()
        if pushing:
            self._ask_why()

    def close(self) -> None:
        """Leave the group, and let the other ranks' threads end."""
        self._drop_ranks()
        super().close()
        self._shards.close()

    def _end_push(self) -> None:
        self._late = True
        self._shards.release()

    def _send(
        self, calls: Calls, group: TrainerGroup, request: Mapping[str, Any], packer: Packer, limit_s: float
    ) -> None:
        work = partial(self._shards.broadcast, group, packer, self._size, limit_s)
        with calls.call({**request, "timeout_s": limit_s}) as call:
            call.beside(work, group.give_up, limit_s)

    def _ask_why(self) -> None:
        """What carries the ranks' messages says more about a rank that is gone than the end of its connection."""
        if self._calls is not None and self._calls.lost is not None:
            self._together({"do": "nothing"}, {})

    def _allocate(self) -> None:
        if self._calls is None:
            super()._allocate()
        else:
            self._shards.allocate()

    def _drop_ranks(self) -> None:
        if self._calls is not None:
            self._calls.close()
        self._calls, self.finds_nonfinite, self._ranks = None, False, 1

    # --- the digest ---------------------------------------------------------------------------------------------------

    def _digest_now(self) -> str:
        if self._calls is None:
            return super()._digest_now()
        assert self._version is not None
        return self._summed(self._calls, self._version) if self._on_gpus else self._hashed(self._calls, self._version)

    def _summed(self, calls: Calls, version: int) -> str:
        with calls.call({"do": "sums", "version": version}) as call:
            own = self._shards.sums(version)
            return added([own, *(each["sums"] for each in call.answers())])

    def _hashed(self, calls: Calls, version: int) -> str:
        """Of all ranks' rows, tensor by tensor: the one that the whole tensors have."""
        packer, hasher = self._shards.packer(version, self._late), Hasher()
        request = {"do": "rows", "version": version, "late": self._late, "size": self._size}
        with calls.call(request) as call:
            for _, shares in groupby(self._shards.shares(self._size), lambda share: share.bucket):
                found = []
                for share in shares:
                    rows = torch.empty(share.nbytes, dtype=torch.uint8)
                    if share.rank:
                        call.take(share.rank, rows)
                    else:
                        packer.pack(share.pieces, rows)
                    found += [(e.offset + first, rows[at : at + last - first]) for e, first, last, at in share.pieces]
                for _, part in sorted(found, key=lambda each: each[0]):
                    hasher.add(part)
            call.answers()
        return hasher.digest()
