"""Moments of an update at which a process stops itself (SIGSTOP) when the harness has asked for it, by a file."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import content
from transfer.backends import arena, disk, process_group
from transfer.config import CollectiveConfig, DiskConfig, IpcConfig, Staging, Take, TransferConfig
from transfer.trainer.publication import Publication
from transfer.trainer.session import Session
from transfer.trainer.two_phase_commit import TwoPhaseCommit
from transfer.worker import plain_worker
from transfer.worker.landing import Landing
from transfer.worker.receiver import Receiver
from transfer.worker.update import Updates


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


def wish(folder: Path, who: str) -> Path:
    """The file that holds the moment at which `who` is to stop."""
    return folder / f"stop-{who}"


class Moments:
    """Those of one process, `who` of the journals in `folder`."""

    def __init__(self, folder: Path, who: str) -> None:
        self._wish = wish(folder, who)

    def reached(self, moment: str) -> None:
        """Stop here, if that is wished; a wish that was taken back meanwhile is none."""
        try:
            if self._wish.read_text() == moment:
                self._wish.unlink()
                os.kill(os.getpid(), signal.SIGSTOP)
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
    moments.around(process_group.WorkerGroup, "_start", before="receive")
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
    moments.around(process_group.TrainerGroup, "_start", before="send")
