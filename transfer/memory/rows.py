"""A tensor in one place, or its rows in several: what a worker finds of each tensor where an update is staged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one tensor, along dim 0, as parts that lie in several places, in their order."""

    parts: tuple[torch.Tensor, ...]


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
        elif source.parts:
            rows += target.split([len(part) for part in source.parts]) if len(source.parts) > 1 else [target]
            sources += source.parts
    if rows:
        torch._foreach_copy_(rows, sources)  # one call: thousands of single ones take up to a tenth longer


def in_one_place(tensors: Mapping[str, Placed]) -> dict[str, torch.Tensor]:
    """The same, if each of them lies in one place; ValueError if not."""
    found = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    if len(found) != len(tensors):
        raise ValueError("the rows of these weights lie in several places, each in the memory of one rank")
    return found
