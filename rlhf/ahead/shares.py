"""A group's samples as shares of equal size, which may be drawn by several workers: one long row holds up fewer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rlhf.ahead.slots import Slot
from rlhf.gather import Group

Unit = tuple[Slot, int]  # a slot, and the number of the first sample of a share of its group


@dataclass(frozen=True, slots=True)
class Shares:
    """`count` shares of `rows` samples each."""

    count: int
    rows: int

    @classmethod
    def of(cls, samples: int, workers: int) -> Shares:
        """As many as there are workers, if so many are of equal size; else fewer."""
        count = max(count for count in range(1, min(samples, workers) + 1) if samples % count == 0)
        return cls(count, samples // count)

    def waiting(self, slots: Iterable[Slot]) -> Iterator[Unit]:
        """Shares of these slots that nobody draws yet, in their order."""
        for slot in slots:
            for first in range(0, self.count * self.rows, self.rows):
                if first not in slot.shares:
                    yield slot, first

    def ask(self, units: Sequence[Unit]) -> None:
        """Somebody draws these now."""
        for slot, first in units:
            slot.shares[first] = None
            slot.asked = len(slot.shares) == self.count

    def give_back(self, units: Sequence[Unit]) -> None:
        """Nobody does any more."""
        for slot, first in units:
            slot.shares.pop(first, None)
            slot.asked = False

    def came(self, units: Sequence[Unit], drawn: Sequence[Group]) -> list[tuple[Slot, Group]]:
        """These were drawn: the groups that are whole with them, without rewards yet."""
        whole = []
        for (slot, first), group in zip(units, drawn, strict=True):
            slot.shares[first] = group
            if len(slot.shares) == self.count and all(share is not None for share in slot.shares.values()):
                whole.append((slot, _joined([slot.shares[at] for at in sorted(slot.shares)])))
        return whole


def _joined(shares: Sequence[Group | None]) -> Group:
    """The samples of all shares as one group."""
    there = [share for share in shares if share is not None]
    return replace(
        there[0],
        completions=[row for share in there for row in share.completions],
        texts=[text for share in there for text in share.texts],
        episodes=[told for share in there for told in share.episodes],
        rewards=[reward for share in there for reward in share.rewards],
    )
