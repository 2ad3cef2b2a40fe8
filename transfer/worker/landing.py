"""A module's tensors as the place where weights arrive: staged ones take their place, or are copied into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from transfer.agreement.dtensor import refuse_dtensors
from transfer.agreement.manifest import Manifest
from transfer.backends.base import Staged
from transfer.memory.digest import digest_of
from transfer.memory.finite import NotFinite, not_finite
from transfer.memory.one_pass import Lying, OnePass, available
from transfer.memory.regions import slot_bytes, views_of
from transfer.memory.rows import Rows, copy_rows, in_one_place, parts_of, places_of
from transfer.memory.sums import SUMS


class Landing:
    """The tensors of `held`, a module's state_dict that is no copy, by the entries of `manifest`.

    On a GPU weights that are to be copied arrive in one block that is laid out as the trainer's slots are: then an
    update is a single copy, whatever the number of tensors.
    """

    def __init__(self, manifest: Manifest, held: Mapping[str, torch.Tensor]) -> None:
        self.manifest = self._manifest = manifest
        self.parameters = {name for name, tensor in held.items() if isinstance(tensor, torch.nn.Parameter)}
        self._tensors = {e.name: list({id(held[n]): held[n] for n in e.names}.values()) for e in manifest.entries}
        self._all = [(name, tensor) for name, tensors in self._tensors.items() for tensor in tensors]
        self._taken: Mapping[str, torch.Tensor] = {}  # what `view` has put in the place of the module's
        self._replaced: list[torch.Tensor] = []
        self._flat = False
        self._copies: dict[int, tuple[Staged, OnePass]] = {}  # by the staged dict, which a slot has for good
        self._reads: dict[int, tuple[Staged, OnePass]] = {}
        self.device = next((tensor.device for tensor in held.values()), torch.device("cpu"))

    @classmethod
    def of(cls, module: torch.nn.Module) -> Landing:
        """The parameters and persistent buffers of a module, by the names of its state_dict."""
        held = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
        refuse_dtensors(held, "a worker's module must hold whole tensors")
        return cls(Manifest.of(held), held)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """One tensor an entry, in the manifest's order."""
        return [self._tensors[entry.name][0] for entry in self._manifest.entries]

    @property
    def plan(self) -> str:
        """How copied weights get here, in words."""
        passes = [one_pass for _, one_pass in self._copies.values()]
        return passes[0].plan if passes else f"{len(self._all)} tensors by torch"

    def wants_block(self, slots: Sequence[Staged]) -> bool:
        """Whether to copy from these slots the module's tensors would have to move first, into one block."""
        return not self._flat and _in_slots(slots) and self._on_gpu(slots)

    @torch.no_grad()
    def prepare(self, slots: Sequence[Staged], owner: torch.device, copied: bool, empty: bool) -> None:
        """Get ready for updates from these slots of `owner`'s memory that are `copied` or take the tensors' place.

        `empty`: nothing has to be kept of what is here now.
        """
        self._copies, self._reads = {}, {}
        if not self._on_gpu(slots):
            return
        if copied and not self._flat and _in_slots(slots):
            self._flatten(empty)
        for staged in slots:
            placed = [staged[entry.name] for entry in self._manifest.entries]
            sources, places = list(parts_of(placed)), places_of(placed)
            lying = Lying.slot if places is None else Lying.slots
            one_pass = partial(OnePass, device=self.device, lying=lying, owner=owner, offsets=places)
            self._reads[id(staged)] = staged, one_pass(sources, None)
            if copied:
                self._copies[id(staged)] = staged, one_pass(sources, self._cut(staged))

    def digest(self, staged: Staged, like: str) -> str:
        """Of staged tensors, all of them in the manifest's order, of the kind of `like`."""
        found = self._reads.get(id(staged)) if like.startswith(SUMS) else None
        if found is not None:
            return found[1].digest()
        return digest_of(parts_of(staged.values()), like, places_of(staged.values()))

    def live_digest(self, like: str, staged: Staged) -> str:
        """Of the module's own tensors, as if they lay where the staged ones do."""
        places = places_of(staged.values())
        return digest_of(self.tensors if places is None else self._cut(staged), like, places)

    def _cut(self, staged: Staged) -> list[torch.Tensor]:
        """The module's tensors in the manifest's order, in parts as the staged ones are."""
        placed = ((staged[entry.name], self._tensors[entry.name][0]) for entry in self._manifest.entries)
        return [part for there, mine in placed for part in (there.of(mine) if isinstance(there, Rows) else [mine])]

    @torch.no_grad()
    def copy(self, staged: Staged, unchecked: bool, with_digest: bool) -> str | None:
        """Copy staged tensors into the module's memory; their digest, if it is wanted and costs nothing.

        NotFinite, with a mixture in the module, if a value is not finite; without the kernel only where nobody has
        looked before (`unchecked`).
        """
        digest, finite = None, not unchecked
        if (found := self._copies.get(id(staged))) is not None:
            digest, finite = found[1].run(with_digest)
        else:
            copy_rows((mine, tensor) for name, tensor in staged.items() for mine in self._tensors[name])
            self._synchronize()
        if not finite:
            bad = not_finite({name: self._tensors[name][0] for name in staged}, self._manifest)
            if bad is not None or found is not None:
                raise NotFinite(f"{bad or 'a tensor'} has values that are not finite")
        return digest

    def view(self, staged: Staged) -> None:
        """Put staged tensors in the place of the module's, unless they are there; those are kept until `forget`."""
        if staged is self._taken:
            return
        tensors = in_one_place(staged)
        kept = self._taken.keys() >= tensors.keys()
        self._replaced = list(self._taken.values()) if kept else [mine.data for _, mine in self._all]
        for name, mine in self._all:
            if name in tensors:
                mine.data = tensors[name]
        self._taken = tensors

    def forget(self) -> None:
        """Free what was replaced: that takes milliseconds, and completions can go on meanwhile."""
        self._replaced = []

    def close(self) -> None:
        """Let go of the slots."""
        self._copies, self._reads = {}, {}
        self._taken = {}
        self.forget()

    def _on_gpu(self, slots: Sequence[Staged]) -> bool:
        """Whether the kernel can get from these slots into the module, or read them."""
        staged = [*(part for slot in slots for part in parts_of(slot.values())), *(mine for _, mine in self._all)]
        here = all(mine.device == self.device for _, mine in self._all)
        if not _in_slots(slots):  # then there will be no block
            here = here and all(mine.is_contiguous() for _, mine in self._all)
        on_gpu = all(tensor.is_cuda for tensor in staged)
        return bool(slots) and here and on_gpu and available(self.device)

    def _flatten(self, empty: bool) -> None:
        """Move the module's tensors into one block; the values, too, unless there are none yet."""
        if empty:  # there may not be room for both
            for _, tensor in self._all:
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=self.device)
            torch.cuda.empty_cache()
        block = torch.zeros(slot_bytes(self._manifest), dtype=torch.uint8, device=self.device)
        for name, view in views_of(block, self._manifest).items():
            if not empty:
                view.copy_(self._tensors[name][0])
            for tensor in self._tensors[name]:
                tensor.data = view
        self._flat = True

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _in_slots(slots: Sequence[Staged]) -> bool:
    """Whether each tensor lies in one place: then a block that is laid out alike takes all of them in one range."""
    return not any(isinstance(tensor, Rows) for slot in slots for tensor in slot.values())
