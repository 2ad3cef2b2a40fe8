"""A tensor in one place, or its rows in several: what a worker finds of each tensor where an update is staged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one tensor, along dim 0, as parts that lie in several places, in their order.

    `places`: where each part begins in the slots of all ranks, one behind the other, bytes: what sums of it count from.
    `whole`: the tensor itself, if its parts have come to lie in one place.
    """

    parts: tuple[torch.Tensor, ...]
    places: tuple[int, ...]
    whole: torch.Tensor | None = None

    def of(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The rows of another tensor of this shape, cut as these are."""
        if len(self.parts) < 2:  # one without dimensions cannot be cut
            return [tensor] * len(self.parts)
        return list(tensor.split([len(part) for part in self.parts]))


Placed = torch.Tensor | Rows


def parts_of(tensors: Iterable[Placed]) -> Iterator[torch.Tensor]:
    """All parts of these tensors: their bytes in order."""
    for tensor in tensors:
        if isinstance(tensor, Rows):
            yield from tensor.parts
        else:
            yield tensor


def copy_rows(pairs: Iterable[tuple[torch.Tensor, Placed]]) -> None:
    """Copy tensors, wherever their rows lie, each into its target."""
    rows: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for target, source in pairs:
        if isinstance(source, torch.Tensor):
            target.copy_(source)
        else:
            rows += source.of(target)
            sources += source.parts
    if rows:
        torch._foreach_copy_(rows, sources)  # one call: thousands of single ones take up to a tenth longer


def places_of(tensors: Iterable[Placed]) -> list[int] | None:
    """Where all parts of these tensors begin in the slots of all ranks; None if they lie in one slot."""
    rows = [tensor for tensor in tensors if isinstance(tensor, Rows)]
    return [place for each in rows for place in each.places] if rows else None


def in_one_place(tensors: Mapping[str, Placed]) -> Mapping[str, torch.Tensor]:
    """These tensors, of which each lies in one place."""
    if not any(isinstance(tensor, Rows) for tensor in tensors.values()):
        return cast("Mapping[str, torch.Tensor]", tensors)
    found = {name: tensor.whole if isinstance(tensor, Rows) else tensor for name, tensor in tensors.items()}
    assert all(tensor is not None for tensor in found.values()), "no backend lets rows in several places be viewed"
    return cast("Mapping[str, torch.Tensor]", found)


def whole_of(placed: Placed, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor in one place: itself, or its rows, of this shape and dtype, put together on `device`."""
    if isinstance(placed, torch.Tensor):
        return placed
    whole = torch.empty(shape, dtype=dtype, device=device)
    copy_rows([(whole, placed)])
    return whole
