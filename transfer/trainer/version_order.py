"""The trainer's half of the order of versions and epochs: which number comes next. No I/O, no clock.

    next       one beyond every number that is used up, so that no number ever stands for two contents
    used up    a worker was told to finish it, whether or not it has answered, or says that it has finished it
    newest     the highest that any worker has finished: what one that has missed it is brought to

The workers' half, agreement/protocol.py, refuses what comes out of this order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transfer.agreement.protocol import AHEAD
from transfer.agreement.wire import TransferError
from transfer.trainer.fleet import Member

NONE = -1  # stands for no version where numbers are compared


class VersionOrder:
    """The versions of one policy, as far as its trainer knows."""

    def __init__(self) -> None:
        self.newest: int | None = None
        self._told = NONE  # the highest that any worker was told to finish, and may have served

    @property
    def highest(self) -> int:
        """The highest number that is used up; -1: none is."""
        return max(self._told, NONE if self.newest is None else self.newest)

    @property
    def next(self) -> int:
        """The number of the next push."""
        return self.highest + 1

    def use_up(self, version: int) -> None:
        """Give no push this number, nor a lower one: a worker may serve it from now on."""
        self._told = max(self._told, version)

    def learn(self, members: Sequence[Member]) -> None:
        """Take over what these workers, all there are, say that they have finished."""
        newest = highest("version", {member: NONE if member.newest is None else member.newest for member in members})
        self.newest = None if newest == NONE else newest


def highest(what: str, told: Mapping[Member, int]) -> int:
    """The highest number of these workers'; TransferError, naming whose it is, if the others could not follow it."""
    member = max(told, key=lambda each: told[each])
    if told[member] >= min(told.values()) + AHEAD:
        raise TransferError(
            f"{member.sender.name} says that its {what} is {told[member]}, which is too far beyond that of the others: "
            "start that worker anew"
        )
    return told[member]
