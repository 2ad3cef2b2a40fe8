"""A transfer of a trainer of several ranks: the first runs the session, the others do their part in it until it ends.

    Leading     the first rank's: a session (session.py), whose publisher takes the others along (backends/shards.py)
    Following   another rank's: carries out what the first says, until that says how it has ended
    Line        what they say to each other, in the same order in each

`open`, `push` and `withdraw` end in all ranks alike, with one version or one error. Between them nobody waits:
`recover`, `join` and `leave` are the first rank's alone, and a worker that is new, or was started again, reads the
slots that are there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self, cast

from transfer.agreement.dtensor import any_dtensor
from transfer.agreement.journal import Journal
from transfer.agreement.wire import TransferError
from transfer.backends.base import Publisher, Weights
from transfer.backends.collective_rows import CollectiveShards
from transfer.backends.collective_shards import CollectiveShardPublisher
from transfer.backends.disk_shards import DiskShardPublisher, DiskShards
from transfer.backends.make import make_publisher
from transfer.backends.rank_rows import check_placements
from transfer.backends.shards import ShardPublisher, Shards
from transfer.config import (
    CollectiveConfig,
    DiskConfig,
    InFlight,
    IpcConfig,
    Staging,
    TransferConfig,
    check_takes_shards,
    taken,
)
from transfer.trainer.interfaces import Ranks, Sender, Transfer
from transfer.trainer.push_stats import PushStats
from transfer.trainer.session import Session

SHARDS, WHOLE = "shards", "whole tensors"
OfRank = Shards | DiskShards | CollectiveShards


def make_of_ranks(
    config: TransferConfig, folder: Path, in_flight: InFlight, journal: Journal, ranks: Ranks
) -> Transfer:
    """This rank's transfer; all ranks make theirs at once. What one cannot make, none has: TransferError."""
    line = Line(ranks)
    made: list[OfRank] = []
    if isinstance(config, IpcConfig):
        config = replace(config, take=taken(config.take, ranks.count))

    def socket() -> str | None:
        made.extend(_of_rank(config, folder, ranks))
        return made[0].socket if made else None

    def leading() -> Leading:
        sockets = line.by_all(socket)
        publisher = _publisher(config, folder, made, sockets, line)
        return Leading(Session(publisher, config, in_flight, journal), config, line)

    try:
        if ranks.number == 0:
            return line.led(leading, lambda transfer: dict(transfer.endpoint))
        line.part(socket)
        return Following(line, made[0] if made else None, line.followed())
    except BaseException:
        for shards in made:
            shards.close()
        raise


def _of_rank(config: TransferConfig, folder: Path, ranks: Ranks) -> Iterator[OfRank]:
    """This rank's part in sending shards; none where they will be refused."""
    holders = ranks.count // ranks.hosts
    match config:
        case IpcConfig(staging=Staging.arena):
            yield Shards(ranks.number % holders, holders)
        case DiskConfig() if ranks.hosts == 1:
            yield DiskShards(config, folder, ranks.number, ranks.count)
        case CollectiveConfig() if ranks.hosts == 1:
            yield CollectiveShards(config, ranks.number, ranks.count)


def _publisher(
    config: TransferConfig, folder: Path, made: Sequence[OfRank], sockets: Sequence[str], line: Line
) -> Publisher:
    """The first rank's sending half."""
    for of_rank in made:
        together = line.taking_along(of_rank.carry_out)
        if isinstance(config, DiskConfig):
            return DiskShardPublisher(config, folder, line.count, together)
        if isinstance(config, CollectiveConfig):
            return CollectiveShardPublisher(config, cast("CollectiveShards", of_rank), line.count, together)
        if isinstance(config, IpcConfig):
            return ShardPublisher(config, cast("Shards", of_rank), sockets, together, line.hosts)
    return make_publisher(config, folder)


class Line:
    """Between the ranks of a trainer; once one of them is gone nothing more is said."""

    def __init__(self, ranks: Ranks) -> None:
        self.number, self.count, self.hosts = ranks.number, ranks.count, ranks.hosts
        self._ranks = ranks
        self._broken: str | None = None

    # --- the first rank -----------------------------------------------------------------------------------------------

    def led(self, work: Callable[[], Any], outcome: Callable[[Any], Any]) -> Any:
        """What `work` gives or raises; the other ranks, which follow, hear its outcome, or the error's text."""
        try:
            done = work()
        except BaseException as error:
            with suppress(TransferError):
                self._told({"error": _text(error)})
            raise
        self._told({"done": outcome(done)})
        return done

    def by_all(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` gives in each rank, while the others have `part` in it; TransferError: which rank failed, why."""
        answers = self.part(work)
        for rank, said in enumerate(answers):
            if "error" in said:
                raise TransferError(f"rank {rank}: {said['error']}")
        return [said["did"] for said in answers]

    def taking_along(
        self, carry_out: Callable[[Mapping[str, Any], Weights], Any]
    ) -> Callable[[Mapping[str, Any], Weights], list[Any]]:
        """`carry_out(step, weights)` of this rank as a call by all, each with its own weights."""

        def together(step: Mapping[str, Any], weights: Weights) -> list[Any]:
            self._told(dict(step))
            return self.by_all(lambda: carry_out(step, weights))

        return together

    # --- any rank -----------------------------------------------------------------------------------------------------

    def part(self, work: Callable[[], Any]) -> list[dict[str, Any]]:
        """Do this rank's part: what each rank's gave, `did`, or the text of its `error`."""
        ended: BaseException | None = None
        try:
            said = {"did": work()}
        except BaseException as error:
            said = {"error": _text(error)}
            ended = None if isinstance(error, Exception) else error
        answers = self._said(self._ranks.gathered, said)
        if ended is not None:
            raise ended
        return answers

    def followed(self, carry_out: Callable[[Mapping[str, Any]], Any] | None = None) -> Any:
        """Carry out what the first rank says until it is done: its outcome; TransferError with its error's text."""
        while True:
            told = self._told(None)
            if "error" in told:
                raise TransferError(told["error"])
            if "done" in told:
                return told["done"]
            assert carry_out is not None
            self.part(lambda step=told: carry_out(step))  # type: ignore[misc]

    def _told(self, value: Any) -> Any:
        return self._said(self._ranks.told, value)

    def _said(self, how: Callable[[Any], Any], value: Any) -> Any:
        if self._broken is not None:
            raise TransferError(self._broken)
        try:
            return how(value)
        except BaseException as error:
            self._broken = f"the ranks of this trainer have lost each other: {_text(error)}"
            if isinstance(error, Exception):
                raise TransferError(self._broken) from error
            raise


class _OfRank(ABC):
    """A context that closes what it is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Of this rank alone."""


class Leading(_OfRank):
    """The first rank's transfer: `session`, of whose verbs the other ranks hear how they ended."""

    def __init__(self, session: Session, config: TransferConfig, line: Line) -> None:
        self.endpoint = session.endpoint
        self._session = session
        self._config = config
        self._line = line
        self._kind = WHOLE

    @property
    def last(self) -> PushStats:
        """What the last push took."""
        return self._session.last

    @property
    def epoch(self) -> int:
        """The highest that this session has taken."""
        return self._session.epoch

    def open(self, weights: Weights, senders: Sequence[Sender], version: int = 0, epoch: int = 0) -> None:
        """As Session.open; ValueError also for shards that this transfer does not take."""
        self._led(lambda: self._open(weights, senders, version, epoch))

    def push(self, weights: Weights) -> int:
        """As Session.push; a value that is not finite, or an error, in any rank fails it in all."""
        version: int = self._led(lambda: self._push(weights))
        return version

    def withdraw(self) -> None:
        """As Session.withdraw."""
        self._led(self._session.withdraw)

    def recover(self, sender: Sender) -> bool:
        """As Session.recover; no other rank takes part."""
        return self._session.recover(sender)

    def join(self, sender: Sender) -> bool:
        """As Session.join; no other rank takes part."""
        return self._session.join(sender)

    def leave(self, sender: Sender) -> None:
        """As Session.leave; no other rank takes part."""
        self._session.leave(sender)

    def close(self) -> None:
        """As Session.close; no other rank takes part."""
        self._session.close()

    def _led(self, work: Callable[[], Any]) -> Any:
        return self._line.led(work, self._outcome)

    def _outcome(self, value: Any) -> dict[str, Any]:
        return {"value": value, "epoch": self.epoch, "last": asdict(self.last)}

    def _open(self, weights: Weights, senders: Sequence[Sender], version: int, epoch: int) -> None:
        kinds = self._line.by_all(lambda: _kind(weights, self._line))
        if len(set(kinds)) > 1:
            raise ValueError(f"all ranks must hold shards of the weights, or all of them whole ones (got {kinds})")
        if kinds[0] == SHARDS:
            check_takes_shards(self._config, self._line.hosts)
        self._session.open(weights, senders, version, epoch)
        self._kind = kinds[0]

    def _push(self, weights: Weights) -> int:
        if any_dtensor(weights.values()) is not (self._kind == SHARDS):
            raise ValueError(f"the transfer was opened with {self._kind}: push such weights, or open it again")
        return self._session.push(weights)


class Following(_OfRank):
    """Another rank's transfer: its part in what the first does, with `shards` of its own, and what came of it."""

    def __init__(self, line: Line, shards: OfRank | None, endpoint: Mapping[str, Any]) -> None:
        self.endpoint = endpoint
        self.last = PushStats()  # what the first rank's last push took
        self.epoch = 0  # of the first rank, when it said something last
        self._line = line
        self._shards = shards

    def open(self, weights: Weights, senders: Sequence[Sender] = (), version: int = 0, epoch: int = 0) -> None:
        """While the first rank opens its own; TransferError with the text of what that raises."""
        self._line.part(lambda: _kind(weights, self._line))
        self._follow(weights)

    def push(self, weights: Weights) -> int:
        """While the first rank pushes; the new version, or TransferError with the text of what that raises."""
        version: int = self._follow(weights)
        return version

    def withdraw(self) -> None:
        """While the first rank withdraws; TransferError with the text of what that raises."""
        self._follow({})

    def recover(self, sender: Sender) -> bool:
        """Never: the first rank alone knows the workers."""
        raise ValueError("recover() is the first rank's: the others have no senders")

    def join(self, sender: Sender) -> bool:
        """Never, for the same reason."""
        raise ValueError("join() is the first rank's: the others have no senders")

    def leave(self, sender: Sender) -> None:
        """Never, for the same reason."""
        raise ValueError("leave() is the first rank's: the others have no senders")

    def close(self) -> None:
        """Stop sharing this rank's rows; workers keep what they have mapped."""
        if self._shards is not None:
            self._shards.close()

    def _follow(self, weights: Weights) -> Any:
        try:
            told = self._line.followed(lambda step: self._carry_out(step, weights))
        finally:
            if self._shards is not None:
                self._shards.release()
        self.epoch, self.last = told["epoch"], PushStats(**told["last"])
        return told["value"]

    def _carry_out(self, step: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        assert self._shards is not None
        return self._shards.carry_out(step, weights)


def _kind(weights: Weights, line: Line) -> str:
    """What this rank holds; ValueError for DTensors that are sharded otherwise than can be sent."""
    if not any_dtensor(weights.values()):
        return WHOLE
    check_placements(weights, line.number, line.count, line.hosts)
    return SHARDS


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
