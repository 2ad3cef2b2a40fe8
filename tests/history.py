"""The rules that a run's history must obey, checked on the journals (agreement/journal.py) of all its processes.

- What is served, version and digest, was published before, and staged before in that very start of the worker.
- Versions never go down within a start of a worker, nor within a trainer. Once a push is acknowledged, none of its
  workers, not even one that was started again, serves anything older in a completion that begins later. Whatever a
  trainer with a lower epoch has pushed is older.
- A worker that joins a trainer with a version serves nothing older; one that has left serves nothing any more.
- What was withdrawn, and whatever is older, is served no more, as its memory may have changed.
- A start of a worker applies a version once at most, unless an update failed in between: weights may be torn then. It
  obeys the trainer with the highest epoch alone.
- A trainer consumes no sample twice, and none that is older than the allowed lag.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def check(folder: Path, lag: int = 0) -> Counter[str]:
    """How many events of each kind the journals in `folder` hold; AssertionError with the lines that break a rule.

    `lag`: by how many versions a consumed sample may be older than the live weights.
    """
    events = [event for path in sorted(folder.glob("*.jsonl")) for event in read(path)]
    wrong = list(History(lag).broken(events))
    lines = "\n".join(f"  {rule}: {json.dumps(event)}" for rule, event in wrong[:10])
    assert not wrong, f"{len(wrong)} rules are broken in {folder}:\n{lines}"
    return Counter(event["op"] for event in events)


def read(path: Path) -> Iterator[Event]:
    """The events of one journal; a broken line must be the last that its writer, killed meanwhile, began."""
    boot = torn = None
    for line in path.read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            assert torn is None, f"{path} has a broken line: {torn}"
            torn = line
        else:
            assert torn is None or event["boot"] != boot, f"{path} has a broken line: {torn}"
            boot, torn = event["boot"], None
            yield event


class History:
    """What has happened so far; versions and their digests, by start (boot) of a worker or by worker."""

    def __init__(self, lag: int) -> None:
        self._lag = lag
        self._epoch = 0
        self._published: set[tuple[int, str | None]] = set()
        self._staged: dict[tuple[str, int], int] = {}  # boot and version: the trainer's epoch
        self._applied: set[tuple[str, int]] = set()  # by boot
        self._withdrawn: dict[str, int] = {}  # the highest version, by boot of a worker; until its next trainer
        self._reached: Counter[str] = Counter()  # newest version, by boot of a worker or a trainer
        self._fence: Counter[str] = Counter()  # newest trainer's epoch, by boot
        self._workers: dict[int, set[str]] = defaultdict(set)  # of the trainer with this epoch
        self._pushed: dict[str, tuple[int, int]] = {}  # epoch and version of the last acknowledged push, by worker
        self._left: set[str] = set()  # workers
        self._consumed: set[tuple[str, int]] = set()  # seeds, by boot of the trainer

    def broken(self, events: list[Event]) -> Iterator[tuple[str, Event]]:
        """Each rule that an event breaks, in the order of time."""
        trained = any(event["op"] == "open" for event in events)
        for event in events:
            if event["op"] == "finish" and event["epoch"] == 0:  # one-shot: its trainer keeps no journal
                self._published.add((event["version"], event["digest"]))
                self._staged[event["boot"], event["version"]] = 0
            elif event["op"] == "start" and not trained:
                self._published.add((event["version"], event["digest"]))
        moments = [(event["t"], event["op"], event) for event in events]
        moments += [(event["began"], "begin", event) for event in events if event["op"] == "serve"]
        for _, op, event in sorted(moments, key=lambda moment: moment[:2]):
            yield from ((rule, event) for rule, holds in self._rules(op, event).items() if not holds)
            self._note(op, event)

    def _rules(self, op: str, event: Event) -> dict[str, bool]:
        match op, event:
            case "init", {"boot": boot, "epoch": epoch}:
                return {"took an old trainer": epoch > self._fence[boot]}
            case "start" | "update", {"boot": boot, "epoch": epoch}:
                return {"obeyed an old trainer": epoch == self._fence[boot]}
            case "serve", {"versions": [first, *_] as versions, "boot": boot, "digest": digest}:
                epoch, floor, pushed = self._staged.get((boot, first), -1), event["floor"], event["pushed"]
                return {
                    "served what was not published": (versions[-1], digest) in self._published,
                    "served what was not staged": all((boot, version) in self._staged for version in versions),
                    "served what was withdrawn": first > self._withdrawn.get(boot, -1),
                    f"went down from {floor}": first >= floor and versions == sorted(versions),
                    f"older than epoch and version {pushed}": (epoch, first) >= pushed,
                    "served after it had left": not event["left"],
                }
            case "pushed", {"boot": boot, "version": version}:
                return {"the trainer went down": (boot not in self._reached) or version > self._reached[boot]}
            case "finish", {"result": "done", "boot": boot, "version": version, "digest": digest, "epoch": epoch}:
                return {
                    "obeyed an old trainer": epoch == self._fence[boot],
                    "finished what was not published": (version, digest) in self._published,
                    "went down": version >= self._reached[boot],
                    "applied twice": (boot, version) not in self._applied,
                }
            case "consume", {"boot": boot, "version": version, "oldest": oldest, "seeds": seeds}:
                return {
                    "consumed too old a sample": version - self._lag <= oldest <= version,
                    "consumed a sample twice": len({(boot, seed) for seed in seeds} - self._consumed) == len(seeds),
                }
        return {}

    def _note(self, op: str, event: Event) -> None:
        match op, event:
            case "open", {"epoch": epoch}:
                if epoch <= self._epoch:  # nobody knew of the trainer before: all workers were started anew
                    self._pushed.clear()
                self._epoch = epoch
            case "publish", {"version": version, "digest": digest}:
                self._published.add((version, digest))
            case "pushed", {"boot": boot, "epoch": epoch, "version": version}:
                self._epoch = max(self._epoch, epoch)  # it takes another after a failure
                self._pushed |= {w: max((epoch, version), self._pushed.get(w, (0, 0))) for w in self._workers[epoch]}
                self._reached[boot] = version
            case "join", {"worker": name, "epoch": epoch, "version": int(version)}:
                self._pushed[named(name)] = max((epoch, version), self._pushed.get(named(name), (0, 0)))
            case "leave", {"worker": name, "epoch": epoch}:
                self._left.add(named(name))
                self._workers[epoch].discard(named(name))
            case "consume", {"boot": boot, "seeds": seeds}:
                self._consumed |= {(boot, seed) for seed in seeds}
            case _:
                self._note_worker(op, event)

    def _note_worker(self, op: str, event: Event) -> None:
        who, boot = event["who"], event["boot"]
        match op, event:
            case "init", {"epoch": epoch}:
                self._workers[epoch].add(who)
                self._left.discard(who)
                self._fence[boot] = epoch
                self._withdrawn.pop(boot, None)
            case "withdraw", {"result": "done", "version": version}:
                self._withdrawn[boot] = version
            case "update", {"result": "done", "epoch": epoch, "version": version}:
                self._staged[boot, version] = epoch
            case "finish", {"result": "done", "version": version}:
                self._applied.add((boot, version))
                self._reached[boot] = version
            case "failed", _:
                self._applied = {(other, version) for other, version in self._applied if other != boot}
            case "begin", _:
                event["floor"], event["pushed"] = self._reached[boot], self._pushed.get(who, (0, 0))
                event["left"] = who in self._left
            case "serve", {"versions": [*_, last]}:
                self._reached[boot] = max(self._reached[boot], last)


def named(worker: str) -> str:
    """How a worker's journal calls it that its sender calls `worker 1 (http://127.0.0.1:40123)`."""
    return worker.partition(" (")[0].replace(" ", "-")
