"""What a program that runs in all ranks of a trainer needs of them: a share, sums, and what the first has heard."""

from __future__ import annotations

import multiprocessing.connection as mp
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from rlhf.ranks.frames import packed, unpacked
from rlhf.ranks.place import Place
from rlhf.ranks.star import Star
from rlhf.ranks.watch import Gone, Watch
from rlhf.shell.ending import EXPLAINED, RunError, unbroken
from transfer.agreement.shown import one_line


def shown(error: BaseException) -> str:
    """An error in one line, with its type where the words do not explain it."""
    said = one_line(str(error))
    return said if isinstance(error, EXPLAINED) else f"{type(error).__name__}: {said}"


T = TypeVar("T")
NOTICE_S = 2.0  # until it is known why a collective has broken
LATE = re.compile(r"Timed out waiting \d+ ?ms for (?:recv|send) operation")  # gloo's words


class Ranks:
    """This rank of a trainer of `count`, `number` 0 to count - 1; by itself the only one, for which all is a no-op.

    Every method is called by all ranks, in the same order.
    """

    number = 0
    count = 1
    hosts = (
        1  # of equally many ranks, one host's behind the other's; each host's ranks hold all rows of sharded weights
    )
    listening = True  # whether all others will hear what the first asks for, before anything else

    def __init__(self) -> None:
        self._acts: dict[str, Callable[[Any], Any]] = {}

    @property
    def first(self) -> bool:
        """Whether this rank speaks with the outside."""
        return self.number == 0

    @property
    def host(self) -> int:
        """The number of the host that this rank is on."""
        return self.number // self.holders

    @property
    def holders(self) -> int:
        """How many ranks a host has, which hold all rows of sharded weights between them."""
        return self.count // self.hosts

    @property
    def holder(self) -> int:
        """The number of this rank among those of its host."""
        return self.number % self.holders

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """Those of the parts that this rank computes: contiguous, as many as others have, or one less."""
        return parts[len(parts) * self.number // self.count : len(parts) * (self.number + 1) // self.count]

    def told(self, value: Any) -> Any:
        """What the first rank gives, JSON or columns, in all ranks."""
        return value

    def gathered(self, value: Any) -> list[Any]:
        """What each rank gives, in their order, in all ranks."""
        return [value]

    def heard(
        self,
        call: Callable[[], T],
        tell: Callable[[T], Any] = lambda value: value,
        hear: Callable[[Any], T] = lambda told: told,
    ) -> T:
        """What `call` gives in the first rank, in all: the others get hear(tell(value)). An error in it ends all."""
        return call()

    def rest(self) -> None:
        """All are here, and what comes next is that the others hear from the first."""

    def serve(self, name: str, act: Callable[[Any], Any]) -> None:
        """What this rank does when the first asks all for `name`; JSON or columns in and out."""
        self._acts[name] = act

    def together(self, name: str, value: Any) -> list[Any]:
        """In the first rank alone: what all ranks' acts of this name make of the value, in their order.

        The others come to it where they next hear from the first: nobody else may wait for anything then.
        """
        return [self._acts[name](value)]

    def sums(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Each number added up over the ranks that have one of its name, in their order."""
        totals: dict[str, float] = {}
        for each in self.gathered(dict(numbers)):
            for name, value in each.items():
                totals[name] = totals[name] + value if name in totals else value
        return totals

    @contextmanager
    def explained(self) -> Iterator[None]:
        """RunError where this rank is interrupted, or a collective breaks, because another one is gone."""
        yield


ALONE = Ranks()


class Joined(Ranks):
    """One of several ranks, by its connections to the first, or the first's to all."""

    def __init__(self, place: Place, star: Star, address: str, timeout_s: float) -> None:
        super().__init__()
        self.number, self.count, self.hosts = place.number, place.count, place.hosts
        self.address, self.timeout_s = (
            address,
            timeout_s,
        )  # of the first rank; for another rank to come to where this one is
        self._star, self._closed = star, False
        self._unexplained: Exception | None = None
        self.watch = Watch(star, place.number)

    def close(self, error: BaseException | None = None) -> None:
        """Part once all have come here; after an error at once, and who still waits for this rank ends, too."""
        if self._closed:
            return
        self._closed = True
        if self.first:
            with suppress(RunError, OSError, EOFError):
                if error is None:
                    self.gathered(None)
            self.watch.close()
        else:
            self.watch.close()
            if error is None:
                self.gathered(None)
            else:
                self.watch.give_up(f"rank {self.number} of the trainer: {shown(error)}")
        self._star.close()

    def told(self, value: Any) -> Any:
        """What the first rank gives, JSON or columns, in all ranks."""
        return self.heard(lambda: value)

    def gathered(self, value: Any) -> list[Any]:
        """What each rank gives, in their order, in all ranks."""
        with self.explained():
            if self.first:
                every = [value, *(self._received(each) for each in self._star.talk)]
                self._say(every)
                return every
            self._star.talk[0].send_bytes(packed(value))
            return self._hear()

    def heard(
        self,
        call: Callable[[], T],
        tell: Callable[[T], Any] = lambda value: value,
        hear: Callable[[Any], T] = lambda told: told,
    ) -> T:
        """What `call` gives in the first rank, in all: the others get hear(tell(value)). An error in it ends all."""
        if not self.first:
            with self.explained():
                told = self._hear()
            return hear(told)
        self.listening = True
        with self.interrupted():
            value = call()
        with self.explained():
            self._say(tell(value))
        self.listening = False
        return value

    def rest(self) -> None:
        """All are here, and what comes next is that the others hear from the first."""
        self.told(None)
        self.listening = True

    def together(self, name: str, value: Any) -> list[Any]:
        """In the first rank alone: what all ranks' acts of this name make of the value, in their order.

        The others come to it where they next hear from the first: nobody else may wait for anything then.
        """
        with self.explained():
            self._say(value, name)
            own = self._acts[name](value)
            return [own, *(self._received(each) for each in self._star.talk)]

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """RunError where another rank's end has interrupted this one."""
        try:
            yield
        except Gone:
            raise RunError(self.watch.cause or "another rank of the trainer is gone") from None

    @contextmanager
    def explained(self) -> Iterator[None]:
        """RunError where this rank is interrupted, or a collective breaks, because another one is gone."""
        try:
            with self.interrupted():
                yield
        except EXPLAINED:
            raise
        except (RuntimeError, OSError, EOFError) as error:
            if error is self._unexplained:  # by a block inside this one
                raise
            self._unexplained = error
            cause = self.watch.why(NOTICE_S)
            if cause is None and LATE.search(str(error)):
                cause = (
                    f"another rank of the trainer has not come to where this one is for {self.timeout_s:g} s "
                    "(trainer.timeout_s)"
                )
            if cause is None:
                raise
            raise RunError(cause) from error

    def _say(self, value: Any, act: str | None = None) -> None:
        raw = packed([act, value])
        with unbroken():  # a signal is not to leave half of it on the way
            for each in self._star.talk:
                each.send_bytes(raw)

    def _hear(self) -> Any:
        """What the first rank says; what it asks for before is done."""
        while True:
            act, value = unpacked(self._star.talk[0].recv_bytes())
            if act is None:
                return value
            self._star.talk[0].send_bytes(packed(self._acts[act](value)))

    def _received(self, connection: mp.Connection) -> Any:
        if not connection.poll(self.timeout_s):
            number = self._star.talk.index(connection) + 1
            raise RunError(
                f"rank {number} of the trainer has not answered for {self.timeout_s:g} s (trainer.timeout_s)"
            )
        return unpacked(connection.recv_bytes())
