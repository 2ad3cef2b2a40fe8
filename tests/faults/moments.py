"""Moments of an update at which a process stops itself, or a rank kills itself, when the harness asks, by a file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tests.faults import content
from transfer.backends import arena, buckets, collective_rows, disk, group_ends, rank_rows, shards
from transfer.backends.collective_shards import CollectiveShardPublisher
from transfer.config import CollectiveConfig, DiskConfig, IpcConfig, Staging, Take, TransferConfig
from transfer.trainer.publication import Publication
from transfer.trainer.ranks import Leading, Line
from transfer.trainer.session import Session
from transfer.trainer.two_phase_commit import TwoPhaseCommit
from transfer.worker import plain_worker
from transfer.worker.landing import Landing
from transfer.worker.receiver import Receiver
from transfer.worker.update import Updates

OPENING = ["started", "meet", "met", "make", "made", "prepare", "prepared"]
OPENING_FIRST = ["agree", "agreed"]
PUSHING = ["fill", "filled", "look", "say", "said"]
PUSHING_FIRST = ["write", "digest", "digested", "wrote", "tell", "heard", "released", "outcome"]


def of_worker(config: TransferConfig) -> list[str]:
    """Those that a worker comes to."""
    found = ["start", "stage", "staged", "write", "written", "flipped", "serve"]
    if getattr(config, "take", None) is Take.copy:
        found += ["copying"] * 3  # the longest of them
    if isinstance(config, IpcConfig) and config.exposes:
        found.append("withdraw")
    return found + {DiskConfig: ["read"], CollectiveConfig: ["receive"]}.get(type(config), [])


def of_trainer(config: TransferConfig) -> list[str]:
    """Those that its trainer comes to."""
    found = ["fill", "filled", "write", "wrote", "tell", "heard", "released", "withdraw"]
    if isinstance(config, IpcConfig) and config.staging is Staging.arena:
        found.append("filling a slot")
    return found + {CollectiveConfig: ["send"]}.get(type(config), [])


def of_rank(number: int, config: TransferConfig, opens: bool) -> list[str]:
    """Those that a rank comes to while its trainer opens the transfer, or while it pushes."""
    of_any, of_first = (OPENING, OPENING_FIRST) if opens else (PUSHING, PUSHING_FIRST)
    if not opens and isinstance(config, CollectiveConfig):
        of_any = [*of_any, "broadcast", *["send"] * 3, "sent"]
    elif not opens:
        of_any = [*of_any, *["half a slot"] * 3, "slot written"]
    return of_any + of_first * (number == 0)


def wish(folder: Path, who: str) -> Path:
    """The file that holds the moment at which `who` is to stop."""
    return folder / f"stop-{who}"


def ask(folder: Path, who: str, moment: str) -> None:
    """Wish that `who` stops, or dies, at this moment."""
    file = wish(folder, who)
    new = file.with_name(f".{file.name}")
    new.write_text(moment)
    new.replace(file)


def came(folder: Path, who: str, within_s: float) -> bool:
    """Whether `who` comes to the moment that was asked for in time; else nothing happens there any more."""
    file = wish(folder, who)
    if within(within_s, lambda: not file.exists()):
        return True
    try:
        file.unlink()
    except FileNotFoundError:  # it has come to it just now
        return True
    return False


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Whether it holds within this time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


class Moments:
    """Those of one process, `who` of the journals in `folder`."""

    def __init__(self, folder: Path, who: str, signum: int = signal.SIGSTOP) -> None:
        self._wish, self._signum = wish(folder, who), signum

    def reached(self, moment: str) -> None:
        """Stop, or die, here, if that is wished; a wish that was taken back meanwhile is none."""
        try:
            if self._wish.read_text() == moment:
                self._wish.unlink()
                os.kill(os.getpid(), self._signum)
        except FileNotFoundError:
            return

    def around(self, owner: Any, name: str, before: str = "", after: str = "") -> None:
        """Let a function of `owner` have a moment before it is called, or after it has returned."""
        function: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            if before:
                self.reached(before)
            result = function(*arguments, **named)
            if after:
                self.reached(after)
            return result

        setattr(owner, name, watched)


def in_worker(journal: str) -> None:
    """Let this process stop at the moments of a worker."""
    path = Path(journal)
    moments = Moments(path.parents[1], path.stem)
    moments.around(Updates, "start", before="start")
    moments.around(Updates, "stage", before="stage", after="staged")
    moments.around(Updates, "_replace_weights", before="write", after="flipped")
    moments.around(Updates, "_write_weights", after="written")
    moments.around(Receiver, "withdraw_weights", before="withdraw")
    moments.around(plain_worker, "digest_of", before="serve")
    moments.around(disk, "_read", before="read")
    moments.around(group_ends.WorkerGroup, "_start", before="receive")
    copy = Landing.copy

    def in_two_halves(self: Landing, staged: Any, *arguments: Any) -> Any:
        half = len(staged) // 2
        copy(self, dict(list(staged.items())[:half]), *arguments)
        moments.reached("copying")
        return copy(self, dict(list(staged.items())[half:]), *arguments)

    Landing.copy = in_two_halves  # type: ignore[method-assign]


def in_trainer(folder: Path, sender: type) -> None:
    """Let this process stop at the moments of a trainer whose messages go by `sender`."""
    moments = Moments(folder, "trainer")
    moments.around(content, "fill", before="fill", after="filled")
    moments.around(Publication, "write", before="write", after="wrote")
    moments.around(TwoPhaseCommit, "run", after="released")
    moments.around(Session, "withdraw", before="withdraw")
    moments.around(arena, "_copy", before="filling a slot")
    moments.around(sender, "call", before="tell", after="heard")
    moments.around(group_ends.TrainerGroup, "_start", before="send")


def in_rank(folder: Path, number: int, sender: type) -> Moments:
    """Let this process kill itself at the moments of a rank of a trainer whose messages go by `sender`."""
    from torch import distributed

    from transfer.trainer import ranks

    moments = Moments(folder, f"rank-{number}", signal.SIGKILL)
    moments.around(distributed, "init_process_group", before="meet", after="met")
    moments.around(ranks, "Shards", before="make", after="made")
    moments.around(ranks, "CollectiveShards", before="make", after="made")
    moments.around(shards.Shards, "_prepare", before="prepare", after="prepared")
    moments.around(collective_rows.CollectiveShards, "_prepare", before="prepare", after="prepared")
    moments.around(content, "fill", before="fill", after="filled")
    moments.around(shards.Shards, "_write", before="look", after="slot written")
    moments.around(collective_rows.CollectiveShards, "_write", before="look")
    moments.around(collective_rows.CollectiveShards, "broadcast", before="broadcast", after="sent")
    moments.around(buckets.Packer, "pack", before="send")  # of the digest, too
    moments.around(Line, "_said", before="say", after="said")
    if number == 0:
        moments.around(Leading, "_open", before="agree", after="agreed")
        moments.around(Leading, "_outcome", before="outcome")
        moments.around(Publication, "write", before="write", after="wrote")
        moments.around(shards, "_digest", before="digest", after="digested")
        moments.around(CollectiveShardPublisher, "_hashed", before="digest", after="digested")
        moments.around(TwoPhaseCommit, "run", after="released")
        moments.around(sender, "call", before="tell", after="heard")
    held = rank_rows.RowsOfRank.held

    def in_two_halves(self: rank_rows.RowsOfRank, weights: Any) -> Any:
        return Halves(held(self, weights), moments)

    rank_rows.RowsOfRank.held = in_two_halves  # type: ignore[method-assign]
    return moments


class Halves(dict[str, Any]):
    """A dict of which one moment comes to whoever has taken half."""

    def __init__(self, held: Any, moments: Moments) -> None:
        super().__init__(held)
        self._moments = moments

    def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        """First one half, then the other."""
        pairs = iter(super().items())
        yield from islice(pairs, len(self) // 2)
        self._moments.reached("half a slot")
        yield from pairs
