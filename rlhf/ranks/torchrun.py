"""Ranks that torchrun has started: all but the first hear from its store what they are to run.

    torchrun --nproc-per-node 2 -m rlhf.train trainer=replicas

Then the command line counts in the first rank alone: only there anything is composed, checked, written or said.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from rlhf.ranks.place import Place

if TYPE_CHECKING:
    import torch.distributed as dist

START_S = 600.0  # until the first rank has looked at the configuration and the data
RELEASE_S = 10.0  # until the others have heard that there is nothing to run
NOTHING = ""

_kept: list[dist.TCPStore] = []  # by the first rank: others read from it for as long as it is open


def tell(specs: Sequence[str]) -> None:
    """In the first rank: what each of the others is to run, from the first of them on."""
    _kept[:] = [_store(first=True)]
    for number, spec in enumerate(specs, start=1):
        _kept[0].set(_key(number), spec)


def release(count: int) -> None:
    """In the first rank, as it ends: where it has told the others nothing, they have nothing to run."""
    if _kept:
        return
    with suppress(RuntimeError):  # torchrun is gone
        tell([NOTHING] * (count - 1))
        _kept[0].wait([_heard(number) for number in range(1, count)], timedelta(seconds=RELEASE_S))


def heard(place: Place) -> str:
    """In another rank: what it is to run; NOTHING if the first has ended without a run."""
    store = _store(first=False)
    spec = store.get(_key(place.number)).decode()
    store.set(_heard(place.number), "")
    return spec


def _store(first: bool) -> dist.TCPStore:
    """torchrun's own store, or, where its agent keeps none, one that the first rank opens at its address."""
    import torch.distributed as dist

    opens = first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, None, opens, timeout=timedelta(seconds=START_S), wait_for_workers=False)


def _key(number: int) -> str:
    return f"rlhf/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{number}"


def _heard(number: int) -> str:
    return f"{_key(number)}/heard"
