"""Whether the weights of an update are those that its trainer meant: their digest, and that they held still."""

from __future__ import annotations

from collections.abc import Callable

from transfer.backends.base import Intake, Staged
from transfer.config import Verify
from transfer.memory.mark import WENT_ON
from transfer.memory.sums import SUMS
from transfer.worker.place import Place
from transfer.worker.standing import Standing


class Verification:
    """Looks at what came from `intake`, staged or at its `place`, as far as was agreed; ValueError if it is wrong."""

    def __init__(self, intake: Intake, place: Place, standing: Standing) -> None:
        self._intake = intake
        self._place = place
        self._standing = standing

    @property
    def while_copied(self) -> bool:
        """Whether a copy may as well find the digest that will be compared."""
        return self._verify is not Verify.off and (self._standing.state.target_digest or "").startswith(SUMS)

    def check_staged(self, staged: Staged) -> None:
        """Of what stays as it is from now on; else only what was written can be verified."""
        if self._intake.settled:
            self._compare(lambda like: self._place.digest(staged, like), "staged")

    def check_written(self, staged: Staged, digest: str | None) -> None:
        """Of what was just written; `digest` is what the copy has found, if it has looked."""
        self._check_still()
        if digest is not None and self._verify is not Verify.full:
            self._compare(lambda like: digest, "copied")
        elif self._verify is Verify.full or not self._intake.settled:
            self._compare(lambda like: self._live_digest(staged, like), "live")

    @property
    def _verify(self) -> Verify:
        return self._standing.terms.verify

    def _check_still(self) -> None:
        """What was copied out of the trainer's own memory is whole only if the trainer still held still at the end."""
        if self._intake.settled or not self._intake.in_place:
            return
        target = self._standing.state.target
        if self._standing.now().target is None:
            raise ValueError("the lease of the update has ended before its weights were copied")
        if target is None or not self._intake.still(target):
            raise ValueError(f"version {target}: {WENT_ON}")

    def _live_digest(self, staged: Staged, like: str) -> str:
        """Of the module's tensors; unless all is to be looked at, of the slot that has just become them."""
        if self._intake.in_place or self._verify is Verify.full:
            return self._place.live_digest(like, staged)
        return self._place.digest(staged, like)

    def _compare(self, digest: Callable[[str], str], which: str) -> None:
        expected = self._standing.state.target_digest
        if self._verify is Verify.off or expected is None:
            return
        found = digest(expected)
        if found != expected:
            raise ValueError(f"the {which} weights have the digest {found}, and the trainer's have {expected}")
