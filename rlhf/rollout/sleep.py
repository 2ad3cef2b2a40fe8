"""Workers that sleep while the trainer learns: on one GPU its memory is the trainer's then.

withdraw    before the gradient step: workers go to sleep
push        they take memory for weights again, the new weights come, and then memory for the key/value cache
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transfer.wire import RemoteError, TransferError

if TYPE_CHECKING:
    import torch

    from transfer import Sender, Transfer
    from transfer.session import PushStats


class SleepingTransfer:
    """The session `inner`, whose workers sleep, at this level, from each `withdraw` to the next `push`."""

    def __init__(self, inner: Transfer, senders: Sequence[Sender], level: int) -> None:
        self._inner = inner
        self._senders = senders
        self._level = level

    @property
    def endpoint(self) -> Mapping[str, Any]:
        """As the session's."""
        return self._inner.endpoint

    @property
    def last(self) -> PushStats:
        """As the session's."""
        return self._inner.last

    def open(self, weights: Mapping[str, torch.Tensor], senders: Sequence[Sender]) -> None:
        """As the session does."""
        self._senders = senders
        self._inner.open(weights, senders)

    def push(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Wake the workers, and give them the weights before they take memory for anything else."""
        self._tell("wake_up", {"tags": ["weights"]})
        version = self._inner.push(weights)
        self._tell("wake_up", {"tags": ["kv_cache"]})
        return version

    def withdraw(self) -> None:
        """Send the workers to sleep; they finish what they sample first."""
        self._inner.withdraw()
        self._tell("sleep", {"level": self._level})

    def recover(self, sender: Sender) -> bool:
        """As the session does."""
        return self._inner.recover(sender)

    def close(self) -> None:
        """As the session does."""
        self._inner.close()

    def __enter__(self) -> SleepingTransfer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _tell(self, verb: str, body: Mapping[str, Any]) -> None:
        """Each worker in turn; one that has died is asleep enough, and the session will start it again."""
        for sender in self._senders:
            try:
                sender.call(verb, body)
            except RemoteError as error:
                if error.status:
                    raise TransferError(f"{verb} failed: {error}") from error
