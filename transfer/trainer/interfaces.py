"""What a trainer holds, a session, and what it reaches each worker by, a sender, and its other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from transfer.trainer.push_stats import PushStats

    Weights = Mapping[str, torch.Tensor]  # as Module.state_dict() gives them; tied weights under each of their names


class Sender(Protocol):
    """The control plane to one worker."""

    name: str  # as errors and logs call the worker: "worker 0 (http://127.0.0.1:40123)"

    def call(self, verb: str, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """Call one of the worker's verbs (wire.ROUTES) and return its answer; RemoteError if it refuses or is gone."""

    def restart(self) -> bool:
        """If the worker has died, start it anew and wait until it answers; False if it lives, or nobody here can.

        To be called in the thread that started it.
        """

    def close(self) -> None: ...


class Ranks(Protocol):
    """The ranks of one trainer, as a transfer sees them: the same calls in the same order in each."""

    @property
    def number(self) -> int:
        """Of this rank; 0 is the first, which alone talks to the workers."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def hosts(self) -> int:
        """On how many hosts, equally many on each, one host's behind the other's; each host's hold all rows."""

    def told(self, value: Any) -> Any:
        """What the first rank gives, in all ranks; JSON."""

    def gathered(self, value: Any) -> list[Any]:
        """What each rank gives, in their order, in all ranks; JSON."""


class Transfer(AbstractContextManager["Transfer"], Protocol):
    """A session that carries versions of one policy to its workers.

    Of a trainer of several ranks each has one, and all call `open`, `push`, `withdraw` and `close` in the same order;
    those beside the first open it with no senders.
    """

    @property
    def endpoint(self) -> Mapping[str, Any]:
        """What a worker must be told, privately, when it is launched; JSON."""

    @property
    def last(self) -> PushStats:
        """What the last push took."""

    @property
    def epoch(self) -> int:
        """The highest that this session has taken."""

    def open(self, weights: Weights, senders: Sequence[Sender], version: int = 0, epoch: int = 0) -> None:
        """Agree with every worker on the manifest; ValueError with the first differences, before any byte moves.

        For a trainer that goes on: the version of its first push, if no worker has a higher one, and the epoch it had.
        """

    def push(self, weights: Weights) -> int:
        """Make `weights` the live ones in every worker, or in none; the new version. TransferError says who failed."""

    def withdraw(self) -> None:
        """Call before the weights change: workers that serve the trainer's own memory stop; for others, nothing."""

    def recover(self, sender: Sender) -> bool:
        """Bring a worker that was started again to the newest version; False if that is not what it lacks.

        By the first rank alone.
        """

    def join(self, sender: Sender) -> bool:
        """Take a further worker in; True if it serves the newest version now, False if the next push will bring it one.

        By the first rank alone, between two updates; ValueError or TransferError, and nothing is changed.
        """

    def leave(self, sender: Sender) -> None:
        """Go on without this worker; by the first rank alone, between two updates."""

    def close(self) -> None: ...
