"""Backends `gloo` and `nccl`: a torch.distributed broadcast from the trainer to the workers of an update.

The weights travel as bytes, at the offsets of the manifest, in buckets: while one is under way the next is packed. A
worker receives into memory of its own, so that its live weights are whole until `finish`. The process group is formed
at an update, of exactly the workers that take part, and kept while they stay the same; after any failure both sides
drop it, and the next update forms another. Who is authenticated there, and who is not: process_group.py.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from transfer.agreement import wire
from transfer.agreement.manifest import ALIGNMENT, Entry, Manifest, round_up
from transfer.backends.hold import Hold
from transfer.backends.process_group import DEPTH, TrainerGroup, WorkerGroup, listener, one_gpu
from transfer.config import CollectiveConfig, Library, Take, taken
from transfer.memory import regions
from transfer.memory.digest import Hasher, digest_of

SHARE = 0.8  # of a message's deadline, for the whole broadcast: its answer needs time, too
MAX_WORLD = 4096
MAX_BUCKET = 2**40  # bytes
NONCE = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Bucket:
    """The bytes of the manifest from `start` to `end`; of each tensor in them: from which to which of its own bytes."""

    start: int
    end: int
    pieces: tuple[tuple[Entry, int, int], ...]


def buckets_of(manifest: Manifest, size: int) -> list[Bucket]:
    """All bytes of the manifest in buckets of `size` bytes, a multiple of ALIGNMENT; no element is divided."""
    found = []
    entries = deque(entry for entry in manifest.entries if entry.nbytes)
    for start in range(0, manifest.nbytes, size):
        end, pieces = min(start + size, manifest.nbytes), []
        while entries and entries[0].offset < end:
            entry = entries[0]
            pieces.append((entry, max(0, start - entry.offset), min(entry.nbytes, end - entry.offset)))
            if entry.offset + entry.nbytes > end:
                break
            entries.popleft()
        found.append(Bucket(start, end, tuple(pieces)))
    return found


class Broadcast:
    """The trainer's part of one update."""

    def __init__(self, group: TrainerGroup, send: Callable[[float], None]) -> None:
        self._group = group
        self._send = send
        self.where = group.where

    def run(self, timeout_s: float) -> None:
        """Broadcast while the workers receive."""
        self._send(SHARE * timeout_s)

    def give_up(self) -> None:
        """A worker has failed: the others need not wait for it."""
        self._group.give_up()


class CollectivePublisher:
    """The sending half: broadcasts out of the trainer's own tensors, of which it keeps no copy but two buckets.

    It holds those tensors until the next version: a worker that was started again gets them, if they have not changed.
    """

    casts = True
    keeps = True  # as far as `holds` says
    finds_nonfinite = False
    takes_shards = False
    exposes = False
    given: tuple[torch.Tensor, ...] = ()

    def __init__(self, config: CollectiveConfig) -> None:
        if config.library is Library.nccl and not torch.cuda.is_available():
            raise ValueError("transfer=nccl moves weights between GPUs, and torch sees none here: use transfer=gloo")
        self._config = config
        self._size = config.bucket_bytes
        self._manifest = Manifest((), 0)
        self._weights: Mapping[str, torch.Tensor] = {}  # of the version written last
        self._version: int | None = None
        self._digest: str | None = None
        self._device = torch.device("cpu")
        self._memory: list[torch.Tensor] = []
        self._takers: Sequence[Hashable] = ()
        self._group: TrainerGroup | None = None
        self._hold = Hold()  # of the broadcast that began last
        self.endpoint = {"backend": config.library.value, "host": config.host, "take": taken(config.take).value}

    def prepare(self, manifest: Manifest, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Allocate the buckets; what a worker must know of the trainer."""
        self._drop_group()
        with listener(self._config.host):
            pass
        where: dict[str, Any] = {"timeout_s": float(self._config.sender.timeout_s)}
        if self._config.library is Library.nccl:
            self._device = _gpu_of(weights)
            where["device"] = regions.device_uuid(self._device)
        self._manifest, self._version = manifest, None
        self._allocate()
        return where

    def write(
        self, version: int, weights: Mapping[str, torch.Tensor], served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]:
        """Only look: the weights are sent when the workers receive them; the size of a bucket, and the digest."""
        self._weights, self._version = weights, version
        self._digest = self._digest_now() if with_digest else None
        return {"bucket": self._size}, self._digest

    def holds(self, version: int) -> bool:
        """Whether the trainer's tensors are still those of this version, as far as a digest can tell."""
        return version == self._version and self._digest is not None and self._digest_now() == self._digest

    def alongside(self, version: int, takers: Sequence[Hashable]) -> Broadcast:
        """The trainer's part of an update to the version written last; `takers` tells sets of workers apart."""
        assert version == self._version, f"version {version} is not the one written last"
        if self._group is not None and not self._group.usable:
            self._allocate()  # a broadcast that was given up may still read the old ones
        if self._group is None or not self._group.usable or self._takers != takers:
            self._drop_group()
            self._group = TrainerGroup(self._config.library, self._device, 1 + len(takers), self._config.host)
            self._takers = takers
        group = self._group
        self._hold = Hold()
        count, pack = self._packed()
        return Broadcast(group, lambda timeout_s: group.broadcast(timeout_s, count, pack))

    def release(self) -> None:
        """No bucket is packed any more: a broadcast that lags behind its push ends instead of sending later weights."""
        self._hold.end()
        self._synchronize()

    def close(self) -> None:
        """Leave the group; workers keep what they have."""
        self._drop_group()
        self._memory, self._weights = [], {}

    def _allocate(self) -> None:
        size = min(self._size, max(ALIGNMENT, round_up(self._manifest.nbytes, ALIGNMENT)))
        self._memory = [torch.zeros(size, dtype=torch.uint8, device=self._device) for _ in range(DEPTH)]

    def _drop_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def _synchronize(self) -> None:
        """What is queued may write the weights, or read them."""
        for device in {tensor.device for tensor in self._weights.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)

    def _packed(self) -> tuple[int, Callable[[int], torch.Tensor]]:
        """How many buckets there are, and what packs one while the weights are held."""
        self._synchronize()
        hold = self._hold
        buckets = buckets_of(self._manifest, self._size)
        flat: dict[str, torch.Tensor] = {}  # the tensor that the next bucket goes on with

        @torch.no_grad()
        def pack(index: int) -> torch.Tensor:
            bucket, packed = buckets[index], self._memory[index % DEPTH]
            targets, sources = [], []
            for entry, first, last in bucket.pieces:
                if entry.name not in flat:
                    flat.clear()
                    with hold.reading():  # a tensor that is not contiguous is copied
                        flat[entry.name] = self._weights[entry.name].detach().reshape(-1)
                start, itemsize = entry.offset - bucket.start, entry.torch_dtype.itemsize
                targets.append(packed[start + first : start + last].view(entry.torch_dtype))
                sources.append(flat[entry.name][first // itemsize : last // itemsize])
            with hold.reading():
                torch._foreach_copy_(targets, sources)
            return packed[: bucket.end - bucket.start]

        return len(buckets), pack

    @torch.no_grad()
    def _digest_now(self) -> str:
        sent = ((entry, self._weights[entry.name].detach()) for entry in self._manifest.entries)
        cast = (tensor.to(entry.torch_dtype) for entry, tensor in sent)
        if any(tensor.is_cuda for tensor in self._weights.values()):
            return digest_of(cast)
        hasher = Hasher()
        for tensor in cast:
            hasher.add(tensor)
        return hasher.digest()


class Block:
    """Bytes for one update, and whether anybody views them: a module's weights, or a broadcast that was given up."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._holders = self._count()

    def is_free(self) -> bool:
        """Whether all is as it was when it was allocated."""
        return self._count() == self._holders

    def _count(self) -> int:
        return torch._C._storage_Use_Count(self.bytes.untyped_storage()._cdata)  # type: ignore[attr-defined]


class CollectiveIntake:
    """The receiving half: a staged update lies in one block of memory of the worker's own, on its module's device."""

    settled = True
    unchecked = False
    slots: Sequence[dict[str, torch.Tensor]] = ()  # the memory of an update is not known before
    owner = torch.device("cpu")

    def __init__(self, endpoint: Mapping[str, Any]) -> None:
        self._library = Library(endpoint["backend"])
        self._host = str(endpoint["host"])
        self.in_place = Take(endpoint["take"]) is Take.copy
        self._manifest = Manifest((), 0)
        self._device = self._carrier = torch.device("cpu")  # of the module; of what the library moves
        self._timeout_s = 0.0
        self._blocks: list[
            Block
        ] = []  # one is viewed by the module, with `take=view`; the other is for the next update
        self._group: WorkerGroup | None = None

    def prepare(self, manifest: Manifest, where: Mapping[str, Any], device: torch.device) -> None:
        """Remember what will come; ValueError if this worker cannot be in a group with the trainer."""
        wire.only(dict(where), {"timeout_s": _is_seconds, "device": wire.is_str}, "where")
        if self._library is Library.nccl:
            if device.type != "cuda":
                raise ValueError(f"transfer=nccl needs the sampler on a GPU (it is on {device}): use transfer=gloo")
            if regions.device_uuid(device) == where.get("device"):
                raise ValueError(one_gpu(f"both are on {where['device']}"))
            self._carrier = device
        self.close()
        self._manifest, self._device, self._timeout_s = manifest, device, float(where.get("timeout_s", 0.0))

    def stage(self, version: int, where: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Receive one version, together with the other workers of the update."""
        wire.only(dict(where), WHERE, "where")
        missing = sorted(WHERE.keys() - where.keys())
        if missing:
            raise wire.Refused(422, f"where.{missing[0]} is missing")
        if self._group is None or not self._group.usable or self._group.named != (where["port"], where["nonce"]):
            self._leave()
            self._group = WorkerGroup(self._library, self._carrier, self._host, where)
        try:
            block = self._received(self._group, where["bucket"])
        except BaseException:
            self._leave()
            raise
        return {e.name: _view(block[e.offset : e.offset + e.nbytes], e) for e in self._manifest.entries}

    def still(self, version: int) -> bool:
        """Always: what is staged is the worker's own."""
        return True

    def close(self) -> None:
        """Leave the group; weights that view the memory keep it."""
        self._leave()
        self._blocks = []

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def _free_block(self) -> torch.Tensor:
        """Memory for one update: what an earlier one has left, if nobody views it, as its first touch is slow."""
        free = next((block for block in self._blocks if block.is_free()), None)
        if free is None:
            free = Block(self._manifest.nbytes, self._device)
            self._blocks = [*self._blocks[-1:], free]
        return free.bytes

    def _received(self, group: WorkerGroup, size: int) -> torch.Tensor:
        nbytes = self._manifest.nbytes
        block = self._free_block()
        parts = [block[start : start + size] for start in range(0, nbytes, size)]
        if self._device == self._carrier:
            group.broadcast(SHARE * self._timeout_s, len(parts), parts.__getitem__)
            return block
        hosts = [torch.empty(min(size, nbytes), dtype=torch.uint8) for _ in range(DEPTH)]

        def arrived(index: int, tensor: torch.Tensor) -> None:
            parts[index].copy_(tensor)

        def place(index: int) -> torch.Tensor:
            return hosts[index % DEPTH][: len(parts[index])]

        group.broadcast(SHARE * self._timeout_s, len(parts), place, arrived)
        return block


def _view(raw: torch.Tensor, entry: Entry) -> torch.Tensor:
    return raw.view(entry.torch_dtype).view(entry.shape)


def _gpu_of(weights: Mapping[str, torch.Tensor]) -> torch.device:
    device = next((tensor.device for tensor in weights.values() if tensor.is_cuda), None)
    if device is None:
        raise ValueError("transfer=nccl needs the policy on a GPU: set model.device=cuda, or use transfer=gloo")
    return device


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 3600.0


WHERE: dict[str, Callable[[Any], bool]] = {  # of an update
    "bucket": lambda value: wire.is_int(value) and 0 < value <= MAX_BUCKET and value % ALIGNMENT == 0,
    "port": lambda value: wire.is_int(value) and 0 < value < 2**16,
    "nonce": lambda value: isinstance(value, str) and NONCE.fullmatch(value) is not None,
    "world": lambda value: wire.is_int(value) and 2 <= value <= MAX_WORLD,
}
