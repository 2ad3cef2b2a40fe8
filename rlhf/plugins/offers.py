"""Parts that installed packages offer by their entry points; nothing of them is imported here."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib import metadata

from rlhf.plugins.part import KINDS, Part

Offers = Mapping[tuple[str, str], Sequence[metadata.EntryPoint]]


def offered(kind: str) -> list[str]:
    """The names of the installed packages' parts."""
    return [name for of_kind, name in offers() if of_kind == kind]


def owner(part: Part) -> str | None:
    """The package that offers a part of this name, if it is not the one that registers it."""
    others = offers().get((part.kind, part.name), ())
    mine = part.where.partition(":")[0].partition(".")[0]
    return next((package_of(each) for each in others if each.module.partition(".")[0] != mine), None)


def package_of(offer: metadata.EntryPoint) -> str:
    """Whose it is."""
    return f"the package {offer.dist.name}" if offer.dist is not None else offer.module


@functools.cache
def offers() -> Offers:
    """What installed packages offer, looked up once."""
    every = metadata.entry_points()
    found: dict[tuple[str, str], list[metadata.EntryPoint]] = {}
    for kind, each in KINDS.items():
        for offer in every.select(group=each.entry_points):
            found.setdefault((kind, offer.name), []).append(offer)
    return found
