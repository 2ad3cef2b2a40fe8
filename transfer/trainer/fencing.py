"""Which trainer the workers obey: whoever has taken the highest epoch in them. Two trainers never both win one.

    status    the epoch that a worker obeys, and whose it is
    init      this trainer's epoch, and all that both sides must agree on; 409: another trainer has been faster
    status    once more: from `init` on nobody else can change what that worker serves

Every later message carries the epoch, so that none of an earlier trainer's, or of an update that failed, counts. The
workers' half is `_init` in agreement/protocol.py; when an epoch is taken is said in takeover.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from transfer.trainer.fleet import Failures, Fleet, Member


class Fence:
    """This trainer's epoch in its workers; `terms` is what it tells them besides, when it takes one."""

    def __init__(self, fleet: Fleet, terms: Mapping[str, Any]) -> None:
        self.trainer = secrets.token_hex(8)
        self.terms: dict[str, Any] = {"trainer": self.trainer, **terms}
        self.epoch = 0  # the highest that this trainer has taken
        self.replaced = False  # by a later trainer, or one that was faster
        self._fleet = fleet

    def is_anothers(self, status: Mapping[str, Any]) -> bool:
        """Whether the worker obeys a trainer that came after us, or at the same time and was faster."""
        return status["epoch"] > self.epoch or (status["epoch"] == self.epoch and status["trainer"] != self.trainer)

    def agree(self, members: Sequence[Member]) -> Failures:
        """Take the epoch in these workers and note what they serve; who did not agree, or did not answer."""
        info = {"init_info": {"epoch": self.epoch, **self.terms}}
        _, failures = self._fleet.ask(members, "init_weight_transfer_engine", info)
        self.replaced |= any(failure.status == 409 for failure in failures.values())  # since they told their status
        status, silent = self._fleet.ask([member for member in members if member not in failures], "status", {})
        for member, answer in status.items():
            member.serves, member.newest = answer["version"], answer["newest"]
        return failures | silent
