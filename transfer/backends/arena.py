"""Backend `ipc`: slots of shared memory, which workers view or copy; an update says only which slot.

    staging=arena   the trainer writes into a slot that nobody serves, and trains on while workers read
    staging=live    the trainer's own parameters are the only slot: moved there once, at `open`, and copied by workers

At `init` a worker maps the memory, once per run. With `take=view` the slot becomes the worker's weights, so a slot may
be written again only when no worker serves its version any more. With both `live` and `view` the worker's weights are
the trainer's own: an update moves no byte, and before they change the trainer withdraws them. With `live` and `copy` a
word in host memory (mark.py) says whether they have held still while they were copied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from transfer.agreement import wire
from transfer.agreement.manifest import Manifest, same_tensors
from transfer.agreement.shards import is_names, is_ranks
from transfer.agreement.shown import shown
from transfer.backends.base import Staged
from transfer.backends.slots import Slots, SlotsOfRanks
from transfer.config import IpcConfig, Staging, Take, taken
from transfer.memory import regions
from transfer.memory.descriptors import SOCKET, receive_region
from transfer.memory.digest import Hasher, digest_of
from transfer.memory.finite import NotFinite
from transfer.memory.mark import MARK_BYTES, Mark
from transfer.memory.one_pass import Lying, OnePass, addresses, available

MAX_SLOTS = 64


class ArenaPublisher:
    """The sending half with `staging=arena`: fills one slot a version."""

    casts = True
    keeps = True
    takes_shards = False
    exposes = False
    given: tuple[torch.Tensor, ...] = ()

    def __init__(self, config: IpcConfig, slots: Slots | None = None) -> None:
        self._count = config.slots
        self._slots = slots or Slots()
        self._versions: list[int | None] = []  # by slot
        self._passes: dict[int, OnePass] = {}  # by slot
        self.finds_nonfinite = False
        self.endpoint = _endpoint(config, self._slots)

    def prepare(self, manifest: Manifest, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Allocate the slots; what a worker must know to map them."""
        self._versions, self._passes = [None] * self._count, {}
        where = self._slots.allocate(manifest, weights, self._count)
        self.finds_nonfinite = available(self._slots.device)
        return where

    @torch.no_grad()
    def write(
        self, version: int, weights: Mapping[str, torch.Tensor], served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]:
        """Copy, and cast, the weights into a slot whose version is not in `served`; which slot, and the digest.

        NotFinite for weights in which `finds_nonfinite` has found such values.
        """
        slot = self._take_slot(version, served)
        views = self._slots.views[slot]
        if self.finds_nonfinite:
            digest = self._in_one_pass(slot, [weights[name] for name in views], with_digest)
        else:
            digest = _copy(views, weights, with_digest)
        _wait(self._slots.device)
        return {"slot": slot}, digest

    def _take_slot(self, version: int, served: Collection[int]) -> int:
        """The slot that holds this version from now on: one that nobody serves."""
        free = [slot for slot, held in enumerate(self._versions) if held is None or held not in served]
        assert free, f"all slots are served: {self._versions}"
        self._versions = [None if held == version else held for held in self._versions]
        self._versions[free[0]] = version
        return free[0]

    def _in_one_pass(self, slot: int, sources: list[torch.Tensor], with_digest: bool) -> str | None:
        if slot not in self._passes or not self._passes[slot].fits(sources):
            self._passes[slot] = OnePass(sources, list(self._slots.views[slot].values()), self._slots.device)
        torch.cuda.synchronize(self._slots.device)  # other streams may have changed the weights
        digest, finite = self._passes[slot].run(with_digest)
        if not finite:
            raise NotFinite
        return digest

    def release(self) -> None:
        """Nothing: no slot is written before all workers have said what they serve."""

    def close(self) -> None:
        """Stop sharing; workers keep what they have mapped."""
        self._passes = {}
        self._slots.close()


class LivePublisher:
    """The sending half with `staging=live`: moves the parameters into shared memory at `open`, and writes nothing."""

    casts = False
    takes_shards = False

    def __init__(self, config: IpcConfig) -> None:
        self.exposes = config.exposes
        self.keeps = self.exposes  # else workers have copies, and nobody is told when the weights change
        self._slots = Slots()
        self.given: tuple[torch.Tensor, ...] = ()  # as `prepare` was given them
        self._tensors: list[torch.Tensor] = []  # one of them for each entry
        self._places: list[int] = []  # where these are
        self._pass: OnePass | None = None
        self.finds_nonfinite = False
        self.endpoint = _endpoint(config, self._slots)

    @torch.no_grad()
    def prepare(self, manifest: Manifest, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Give the tensors themselves new memory, with the same values; what a worker must know to map it."""
        where = self._slots.allocate(manifest, weights, 1, marked=True)
        self.release()
        for entry in manifest.entries:
            view = self._slots.views[0][entry.name]
            view.copy_(weights[entry.name])
            for name in entry.names:
                weights[name].data = view
        self.given = tuple(weights.values())
        self._tensors = [weights[entry.name] for entry in manifest.entries]
        self._places = addresses(self._tensors)
        self.finds_nonfinite = available(self._slots.device)
        if self.finds_nonfinite:
            self._pass = OnePass(list(self._slots.views[0].values()), None, self._slots.device, Lying.slot)
        return where

    def write(
        self, version: int, weights: Mapping[str, torch.Tensor], served: Collection[int], with_digest: bool
    ) -> tuple[dict[str, Any], str | None]:
        """Only look, and mark the version: ValueError if a tensor is no longer where workers look for it; the digest.

        NotFinite for values that one pass has found: the digest's, or if workers do not look as they copy.
        """
        _wait(self._slots.device)
        looks = self._pass is not None and (with_digest or self.exposes)
        found = self._pass.start(with_digest) if self._pass is not None and looks else None
        self._check_places(weights)  # while the GPU looks
        if found is None:
            digest = digest_of(self._slots.views[0].values()) if with_digest and self._pass is None else None
        else:
            digest, finite = found()
            if not finite:
                raise NotFinite
        assert self._slots.mark is not None
        self._slots.mark.hold(version)
        return {"slot": 0}, digest

    def release(self) -> None:
        """The weights may change from now on: what a worker has not copied by now it will not serve."""
        if self._slots.mark is not None:
            self._slots.mark.let_go()

    def _check_places(self, weights: Mapping[str, torch.Tensor]) -> None:
        views = self._slots.views[0]
        known = same_tensors(weights.values(), self.given)  # the names need not be looked up
        if addresses(self._tensors if known else map(weights.__getitem__, views)) != self._places:
            name = next(name for name, view in views.items() if weights[name].data_ptr() != view.data_ptr())
            raise ValueError(
                f"transfer.staging=live: {name} is not in the memory shared with the workers; give open() the tensors "
                "themselves, module.state_dict(keep_vars=True), and do not replace them"
            )

    def close(self) -> None:
        """Stop sharing; the parameters stay where they are."""
        self.given, self._tensors, self._pass = (), [], None
        self._slots.close()


def _endpoint(config: IpcConfig, slots: Slots) -> dict[str, Any]:
    return {
        "backend": "ipc",
        "staging": config.staging.value,
        "take": taken(config.take).value,
        "socket": slots.socket,
    }


class ArenaIntake:
    """The receiving half: maps the slots once; a staged update is one slot's tensors."""

    def __init__(self, endpoint: Mapping[str, Any]) -> None:
        self._socket = str(endpoint["socket"])
        self._sockets = list(map(str, endpoint.get("sockets", ())))  # of a trainer of several ranks, one a rank
        self._host = int(endpoint.get("host", 0))  # of a trainer on several, the one that this worker is on
        self.in_place = Take(endpoint["take"]) is Take.copy
        self.settled = Staging(endpoint["staging"]) is Staging.arena
        self.unchecked = False
        self._mark: Mark | None = None  # of memory that is not settled, and copied
        self._mapped: regions.Region | SlotsOfRanks | None = None
        self.slots: Sequence[Staged] = ()
        self.owner = regions.HostRegion.device

    def prepare(self, manifest: Manifest, where: Mapping[str, Any], device: torch.device) -> None:
        """Map the trainer's slots; ValueError if `take=view` cannot put them under a module on `device`."""
        wire.only(dict(where), WHERE, "where")
        if "ranks" in where:
            self._prepare_ranks(manifest, where, device)
            return
        slots = where.get("slots", 0)
        nbytes, marks = slots * regions.slot_bytes(manifest), MARK_BYTES * (not self.settled)
        region: regions.Region
        mark: Mark | None = None
        if "handle" in where:
            if marks and self.in_place:
                mark = _mark_of_gpu(where.get("mark"))
            region = regions.PeerCudaRegion(where.get("device", ""), where["handle"], nbytes, device)
        else:
            region = on_host = receive_region(self._socket, nbytes + marks)
            mark = Mark(on_host) if marks else None
        if not self.in_place and region.device != device:
            raise ValueError(
                f"transfer.take=view needs the sampler on the device of the trainer's slots, {region.device} "
                f"(the sampler is on {device}): use transfer.take=copy"
            )
        self.close()
        self._mapped, self._mark = region, mark
        self.unchecked = not self.settled and "handle" in where
        self.slots = [regions.tensors(region, manifest, slot) for slot in range(slots)]
        self.owner = region.device

    def _prepare_ranks(self, manifest: Manifest, where: Mapping[str, Any], device: torch.device) -> None:
        """Map the slots of each of the trainer's ranks."""
        ranks, whole, places = where["ranks"], where.get("whole", ()), where.get("regions")
        if ranks != len(self._sockets):
            raise ValueError(f"where.ranks must be {len(self._sockets)}, the number of endpoint.sockets (got {ranks})")
        if places is not None:
            there, places = len(places), places[self._host * ranks : (self._host + 1) * ranks]
            if there % ranks or len(places) != ranks:
                raise ValueError(f"where.regions must be {ranks}, one a rank, for each host (got {there})")
        if unknown := sorted({*whole} - {entry.name for entry in manifest.entries}):
            raise ValueError(f"where.whole names tensors that are not in the manifest: {shown(unknown)}")
        if not (self.in_place and self.settled):
            raise ValueError("weights of several ranks can only be copied from an arena: use transfer.take=copy")
        slots = where.get("slots", 0)
        if places is None:
            mapped, owner = SlotsOfRanks.of_host(self._sockets, manifest, slots, whole), regions.HostRegion.device
        else:
            mapped, owner = SlotsOfRanks.of_gpus(places, manifest, slots, whole, device), device
        self.close()
        self._mapped, self.slots, self.owner = mapped, mapped.slots, owner

    def stage(self, version: int, where: Mapping[str, Any]) -> Staged:
        """The tensors of the slot that `where` names, by entry name."""
        wire.only(dict(where), {"slot": wire.is_int}, "where")
        if where.get("slot", -1) not in range(len(self.slots)):
            raise ValueError(f"where.slot must be below {len(self.slots)} (got {where.get('slot')})")
        return self.slots[where["slot"]]

    def still(self, version: int) -> bool:
        """Whether what was read of this version up to now is whole: its slot has not been written meanwhile."""
        return self._mark is None or self._mark.holds(version)

    def close(self) -> None:
        """Give up the mapping; weights that view it keep it."""
        self.slots, self._mark = (), None
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None


def _is_slots(value: Any) -> bool:
    return wire.is_int(value) and 1 <= value <= MAX_SLOTS


def _is_socket(value: Any) -> bool:
    return isinstance(value, str) and SOCKET.fullmatch(value) is not None


def _are_regions(value: Any) -> bool:
    keys = {"device": wire.is_str, "handle": wire.is_str}
    return isinstance(value, list) and all(
        isinstance(each, dict) and each.keys() == keys.keys() and all(keys[key](each[key]) for key in keys)
        for each in value
    )


WHERE: dict[str, Callable[[Any], bool]] = {
    "slots": _is_slots,
    "ranks": is_ranks,
    "whole": is_names,
    "regions": _are_regions,
    "device": wire.is_str,
    "handle": wire.is_str,
    "mark": _is_socket,
}


def _mark_of_gpu(socket: str | None) -> Mark:
    if socket is None:
        raise ValueError("where.mark is missing, without which live weights on a GPU cannot be copied")
    try:
        return Mark(receive_region(socket, MARK_BYTES))
    except ConnectionRefusedError as error:
        raise ValueError(
            f"transfer.staging=live with take=copy needs a worker in the trainer's network namespace ({error}): "
            "share it, or use transfer.staging=arena"
        ) from error


def _copy(views: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], with_digest: bool) -> str | None:
    """Fill the slot by torch; on the host each tensor is hashed right after it was copied, while it is in the cache."""
    if not views:
        return digest_of([]) if with_digest else None
    targets, sources = list(views.values()), [weights[name] for name in views]
    if not with_digest or targets[0].is_cuda:
        torch._foreach_copy_(targets, sources)
        return digest_of(targets) if with_digest else None
    hasher = Hasher()
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
        hasher.add(target)
    return hasher.digest()


def _wait(device: torch.device) -> None:
    """Until the bytes are there: a peer's streams know nothing of ours."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
