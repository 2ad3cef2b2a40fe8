"""What the trainers have published and pushed, as their journal tells while they run, and what readers may thus see."""

from __future__ import annotations

import json
from bisect import bisect
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults import content


class Read(NamedTuple):
    """One answer of a worker to `completions`."""

    worker: int
    began: float
    ended: float
    version: int
    digest: str


class Ledger:
    """Follows `journal/trainer.jsonl`."""

    def __init__(self, folder: Path, size: str) -> None:
        self._path = folder / "journal" / "trainer.jsonl"
        self._weights = content.zeros(size)
        self._place = 0
        self._published: dict[tuple[int, str], tuple[float, int]] = {}  # version and digest: since when, and the epoch
        self._floors: list[tuple[float, tuple[int, int]]] = [(0.0, (0, 0))]  # from when on nothing older may be served:
        # than this version of the trainer with this epoch
        self._epoch = 0
        self.last: dict[str, Any] = {"op": "", "t": 0.0}
        self.pushed: dict[str, Any] = {"t": 0.0, "trainer": -1}
        self.pushes = 0
        self._opened = -1  # the trainer that has opened last
        self.opened_again = 0  # how often one did so that had been replaced
        self.started_over = 0  # how often no worker remembered any trainer

    def follow(self) -> None:
        """Read on to the end of the journal."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._place)
            raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        self._place += len(whole)
        for line in whole.splitlines():
            try:
                self._note(json.loads(line))
            except ValueError:
                continue  # its writer was killed; the checker of histories judges

    def _note(self, event: dict[str, Any]) -> None:
        self.last = event
        match event["op"]:
            case "open":
                if event["epoch"] <= self._epoch:
                    self._floors.append((event["t"], (0, 0)))
                    self.started_over += 1
                self.opened_again += event["trainer"] == self._opened
                self._opened = event["trainer"]
                self._epoch = event["epoch"]
            case "publish":
                content.fill(self._weights, event["trainer"], event["push"])
                digest = content.digest(self._weights)
                assert event["digest"] in (None, digest), f"published is other than what was made: {event}"
                self._published[event["version"], digest] = event["t"], event["epoch"]
            case "pushed":
                self._epoch = max(self._epoch, event["epoch"])  # it takes another after a failure
                self._floors.append((event["t"], (event["epoch"], event["version"])))
                self.pushed = event
                self.pushes += 1

    def verdict(self, read: Read) -> tuple[str, str] | None:
        """What is wrong with this answer, in a word and in all; None if nothing is."""
        if (read.version, read.digest) not in self._published:
            self.follow()
        since, epoch = self._published.get((read.version, read.digest), (read.ended, -1))
        if since >= read.ended:
            return "torn or mislabelled", str(read)
        floor = self._floors[bisect(self._floors, read.began, key=lambda entry: entry[0]) - 1][1]
        if (epoch, read.version) < floor:
            return "stale", f"{read}, although epoch and version {floor} was acknowledged before"
        return None
