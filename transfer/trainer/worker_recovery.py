"""What happens when a worker dies: it is started again, agrees anew, and whatever failed there is tried once more.

    silent      its sender starts it again, if it has died and if that can be done from here
    forgetful   its epoch is lower than ours: it was started again, has no weights, and serves nothing
    rejoin      it takes our epoch and agrees on the weights; the update that it has missed is sent to it again

A worker that has lost nothing is not helped: what failed there has another reason, and counts as failed. Nothing is
done where another trainer has taken over any of the workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from transfer.agreement.journal import Journal
from transfer.trainer.fencing import Fence
from transfer.trainer.fleet import CLEAN_UP_S, Failures, Fleet, Member

LOG = logging.getLogger(__name__)


class WorkerRecovery:
    """Brings workers of a fleet back; `restarts` counts them."""

    def __init__(self, fleet: Fleet, fence: Fence, journal: Journal) -> None:
        self.restarts = 0
        self._fleet = fleet
        self._fence = fence
        self._journal = journal

    def retried(
        self, failures: Failures, attempt: Callable[[list[Member]], Failures], together: bool = False
    ) -> Failures:
        """What is left of `failures` after `attempt` with the workers that were started again.

        `together`: one that dies ends the attempt of all, so that it is repeated with all that have failed.
        """
        again = self.rejoined(list(failures))
        if not again:
            return failures
        if together:
            return attempt(list(failures))
        return {member: failure for member, failure in failures.items() if member not in again} | attempt(again)

    def rejoined(self, members: Sequence[Member]) -> list[Member]:
        """Those that were started again meanwhile, or are now, and have agreed on the weights."""
        if not members or self._fence.replaced:  # a worker that was started again is the other trainer's to take
            return []
        asked = list(dict.fromkeys([*self._fleet.members, *members]))  # a fleet that was left may still view our memory
        status, silent = self._fleet.ask(asked, "status", {}, CLEAN_UP_S)
        if any(self._fence.is_anothers(answer) for answer in status.values()):
            return []
        revived = [member for member in members if member in silent and member.sender.restart()]
        status |= self._fleet.ask(revived, "status", {}, CLEAN_UP_S)[0]
        lost = [member for member in members if member in status and status[member]["epoch"] < self._fence.epoch]
        failures = self._fence.agree(lost)
        back = [member for member in lost if member not in failures and not self._fence.replaced]
        for member in back:
            self.restarts += 1
            self._journal.write("rejoin", worker=member.sender.name, epoch=self._fence.epoch)
            LOG.warning("%s was started again and gets the weights anew", member.sender.name)
        return back
