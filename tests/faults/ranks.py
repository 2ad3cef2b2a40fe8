"""One rank of a trainer of several: how they meet, its rows of the weights, and its end when another one is gone.

Ranks find out that one of them is gone as those of a run do (rlhf/ranks/watch.py), or when what they wait for breaks.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from rlhf.ranks import meeting
from rlhf.ranks.place import Place
from rlhf.ranks.ranks import Joined
from rlhf.ranks.star import Star
from rlhf.ranks.starting import LOOPBACK
from tests.transfer.rank_processes import Gloo

PATIENCE_S = 60.0  # for another rank that is there to come to where this one is
LOST = 3  # the exit code of a rank that has ended in order, because another one was gone
WITH_THE_FIRST = 1  # that of one which had nothing to put in order (rlhf/ranks/watch.py)
Pipe = Callable[[], tuple[Connection, Connection]]


class Lost(Exception):
    """Another rank of this trainer is gone."""


@dataclass(frozen=True)
class Seat:
    """The place of one rank, with its connections to the first, or the first's to all."""

    number: int
    count: int
    by_gloo: bool
    talk: tuple[Connection, ...]
    life: tuple[Connection, ...]

    def close(self) -> None:
        """Once the rank is there: by the end of its own connections the others notice its end."""
        for each in (*self.talk, *self.life):
            each.close()


def seats(count: int, by_gloo: bool, pipe: Pipe) -> list[Seat]:
    """One for each rank."""
    talk, life = ([pipe() for _ in range(1, count)] for _ in range(2))
    first = Seat(0, count, by_gloo, tuple(ours for ours, _ in talk), tuple(ours for ours, _ in life))
    others = enumerate(zip(talk, life, strict=True), start=1)
    return [first, *(Seat(number, count, by_gloo, (said[1],), (lives[1],)) for number, (said, lives) in others)]


class Talk:
    """transfer.Ranks, which notes when the ranks have lost each other."""

    def __init__(self, ranks: Any) -> None:
        self.number, self.count, self.hosts = ranks.number, ranks.count, ranks.hosts
        self.lost = False
        self._ranks = ranks

    def told(self, value: Any) -> Any:
        """What the first gives."""
        return self._noted(self._ranks.told, value)

    def gathered(self, value: Any) -> list[Any]:
        """What each gives."""
        return self._noted(self._ranks.gathered, value)

    def shards(self, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's rows of these tensors, in the same memory; one without rows stays as it is."""
        mesh = init_device_mesh("cpu", (self.count,))

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.dim():
                return tensor
            cut = tensor.chunk(self.count)
            mine = cut[self.number] if self.number < len(cut) else tensor[:0]
            shape, stride = tensor.shape, tensor.stride()
            return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

        return {name: rows(tensor) for name, tensor in whole.items()}

    def _noted(self, say: Callable[[Any], Any], value: Any) -> Any:
        try:
            return say(value)
        except BaseException:
            self.lost = True
            raise


@contextmanager
def met(seat: Seat, folder: Path) -> Iterator[Talk]:
    """The ranks, met in a process group; Lost if one of them is gone; what this one says lands in a file."""
    with open(folder / f"rank-{seat.number}.log", "ab", buffering=0) as file:
        os.dup2(file.fileno(), 2)
    place, star = Place(seat.number, seat.count), Star(list(seat.talk), list(seat.life))
    joined, talk = Joined(place, star, LOOPBACK, PATIENCE_S), None
    try:
        with meeting._process_group(joined, torch.device("cpu")), meeting._told_at_once(joined), joined.interrupted():
            talk = Talk(Gloo() if seat.by_gloo else joined)
            yield talk
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        joined.close(error)
        if talk is None or talk.lost or joined.watch.cause is not None:
            raise Lost from error
        raise
