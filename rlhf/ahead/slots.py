"""Which prompts may be drawn, and which groups are learned from: slots, first come, first served; nothing is dropped.

    admitted     a prompt of the stream has a slot: at most (lag + 1) x P have one
    whole        its group is drawn and rewarded
    taken        a step learns from it: P groups, the oldest first
    released     the step's weights are live in every worker: its P slots are free

A prompt that is admitted after the release of step k is learned from in step k + lag + 1 at the latest, so that no
token is older than `lag` versions. With a `window`, up to that many groups may overtake one that is not whole yet; it
may then be older by ceil(window / P) versions.

No threads and no clock: free.py has those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rlhf.gather import Group
from rlhf.types import RewardReport


@dataclass(slots=True, eq=False)
class Slot:
    """A prompt that is admitted and not released."""

    index: int  # in the stream of prompts
    asked: bool = False  # workers are drawing all of its group
    shares: dict[int, Group | None] = field(default_factory=dict)  # that are asked for, by their first sample
    group: Group | None = None  # once it is whole
    report: RewardReport | None = None  # what the reward noted of it, and of the groups that were rewarded with it


@dataclass(slots=True)
class Slots:
    """`size` groups a step; `total` is the number of groups that a run learns from."""

    size: int
    lag: int
    total: int
    window: int = 0
    next: int = 0  # of the stream: the prompt that is admitted next
    learned: int = 0  # groups that steps have learned from, and released
    left_out: int = 0  # from which nothing can be learned; each gave its slot back
    held: list[Slot] = field(default_factory=list)  # in the order of the stream
    taken: list[Slot] = field(default_factory=list)  # of those held, by the step that is under way

    def admit(self) -> None:
        """Give slots to the next prompts of the stream, as long as there are any."""
        room = min((self.lag + 1) * self.size, self.total - self.learned) - len(self.held)
        self.held += [Slot(self.next + place) for place in range(room)]
        self.next += max(0, room)

    def draw_anew(self, version: int, samples: int) -> None:
        """Of a run that goes on: groups that are too old by the turn they have now, or not of so many samples."""
        for place, slot in enumerate(self.held):
            if slot.group is not None:
                completions = slot.group.completions
                oldest = min(min(each.versions) for each in completions)
                if version + place // self.size - oldest > self.lag or len(completions) != samples:
                    slot.asked, slot.group, slot.report, slot.shares = False, None, None, {}

    def waiting(self) -> Iterator[Slot]:
        """Those that nobody draws yet; not of more than may have a slot, as a run that goes on may find."""
        return (slot for slot in self.held[: (self.lag + 1) * self.size] if not slot.asked)

    @property
    def whole(self) -> int:
        """How many groups wait for a step to take them."""
        return sum(slot.group is not None for slot in self.held) - len(self.taken)

    @property
    def running(self) -> int:
        """How many groups are being drawn."""
        return sum(slot.asked and slot.group is None for slot in self.held)

    def leave_out(self, slot: Slot) -> None:
        """Its group teaches nothing: the slot is free for another prompt."""
        self.held.remove(slot)
        self.left_out += 1

    def take(self) -> Sequence[Slot] | None:
        """The groups of the next step, in the order of the stream; None if they are not whole yet."""
        open_, taken = list(self.held), list[Slot]()
        while len(taken) < self.size:
            found = next((slot for slot in open_[: self._reach(open_)] if slot.group is not None), None)
            if found is None:
                return None
            open_.remove(found)
            taken.append(found)
        self.taken = sorted(taken, key=lambda slot: slot.index)
        return self.taken

    def _reach(self, open_: Sequence[Slot]) -> int:
        """How many of the slots may be taken from: the oldest, and what the window lets overtake it."""
        return sum(slot.index <= open_[0].index + self.window for slot in open_[: self.window + 1])

    def release(self) -> None:
        """The step that took groups is over: prompts that come next get their slots."""
        self.held = [slot for slot in self.held if slot not in self.taken]
        self.learned += len(self.taken)
        self.taken = []
        self.admit()
