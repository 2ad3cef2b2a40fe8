"""What a session does besides, where vLLM samples: weights that vLLM can load, and workers that sleep meanwhile.

withdraw    before the gradient step: workers go to sleep, and their memory is the trainer's
push        an adapter is merged into what it adapts; workers take memory for weights, the new ones come, and then
            they take memory for the key/value cache
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf.models.adapter import has_adapter
from rlhf.models.merging import merge_into, merged
from rlhf.ranks.ranks import ALONE, Ranks
from transfer.agreement.wire import RemoteError, TransferError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from transfer import Sender, Transfer
    from transfer.trainer.push_stats import PushStats

    Weights = Mapping[str, torch.Tensor]


def for_vllm(
    transfer: Transfer, policy: PreTrainedModel, senders: Sequence[Sender], sleep_level: int, ranks: Ranks = ALONE
) -> Transfer:
    """The session with what the policy and the configuration ask for; `senders` of the first of `ranks` alone."""
    if has_adapter(policy):
        transfer = MergingTransfer(transfer, policy)
    return SleepingTransfer(transfer, senders, sleep_level, ranks) if sleep_level else transfer


class AroundTransfer:
    """A session that does what `inner` does."""

    def __init__(self, inner: Transfer) -> None:
        self._inner = inner

    @property
    def endpoint(self) -> Mapping[str, Any]:
        """As the session's."""
        return self._inner.endpoint

    @property
    def last(self) -> PushStats:
        """As the session's."""
        return self._inner.last

    @property
    def epoch(self) -> int:
        """As the session's."""
        return self._inner.epoch

    def open(self, weights: Weights, senders: Sequence[Sender], version: int = 0, epoch: int = 0) -> None:
        """As the session does."""
        self._inner.open(weights, senders, version, epoch)

    def push(self, weights: Weights) -> int:
        """As the session does."""
        return self._inner.push(weights)

    def withdraw(self) -> None:
        """As the session does."""
        self._inner.withdraw()

    def recover(self, sender: Sender) -> bool:
        """As the session does."""
        return self._inner.recover(sender)

    def join(self, sender: Sender) -> bool:
        """As the session does."""
        return self._inner.join(sender)

    def leave(self, sender: Sender) -> None:
        """As the session does."""
        self._inner.leave(sender)

    def close(self) -> None:
        """As the session does."""
        self._inner.close()

    def __enter__(self) -> AroundTransfer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class MergingTransfer(AroundTransfer):
    """Sends a policy's adapter merged into its base, whatever weights it is given."""

    def __init__(self, inner: Transfer, policy: PreTrainedModel) -> None:
        super().__init__(inner)
        self._policy = policy
        self._merged = merged(policy).state_dict(keep_vars=True)  # the same tensors at each push

    def open(self, weights: Weights, senders: Sequence[Sender], version: int = 0, epoch: int = 0) -> None:
        """Agree on the merged weights."""
        super().open(self._merged, senders, version, epoch)

    def push(self, weights: Weights) -> int:
        """Merge anew, and send."""
        merge_into(self._policy, self._merged)
        return super().push(self._merged)


class SleepingTransfer(AroundTransfer):
    """Its workers sleep, at this level, from each `withdraw` to the next `push`.

    Their GPUs may be those of any of the trainer's `ranks`: none goes on before all of them sleep, and none of them
    wakes before all ranks have given back what they hold without need.
    """

    def __init__(self, inner: Transfer, senders: Sequence[Sender], level: int, ranks: Ranks = ALONE) -> None:
        super().__init__(inner)
        self._senders = senders
        self._level = level
        self._ranks = ranks

    def push(self, weights: Weights) -> int:
        """Wake the workers, and give them the weights before they take memory for anything else."""
        self._make_room()
        self._tell("wake_up", {"tags": ["weights"]})
        version = super().push(weights)
        self._tell("wake_up", {"tags": ["kv_cache"]})
        return version

    def withdraw(self) -> None:
        """Send the workers to sleep; they finish what they sample first."""
        super().withdraw()
        self._tell("sleep", {"level": self._level})
        self._ranks.gathered(None)

    def _make_room(self) -> None:
        """Give the memory that gradients and activations have left to the workers, on every rank's GPU."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._ranks.gathered(None)

    def _tell(self, verb: str, body: Mapping[str, Any]) -> None:
        """Each worker in turn; one that has died is asleep enough, and the session will start it again."""
        for sender in self._senders:
            try:
                sender.call(verb, body)
            except RemoteError as error:
                if error.status:
                    raise TransferError(f"{verb} failed: {error}") from error
