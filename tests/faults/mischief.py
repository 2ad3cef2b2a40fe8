"""What a bad network does to the messages between a trainer and one worker, whatever carries them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from random import Random
from typing import Generic, TypeVar

INIT, START = "init_weight_transfer_engine", "start_weight_update"
UPDATE = (START, "update_weights", "finish_weight_update")
CONTROL = (INIT, *UPDATE, "abort_weight_update", "withdraw_weights")
RECORDED = 400  # messages; the newest
LATER_S = 0.06  # a message that comes later comes within this time
AFTER_RESTART = 0.3  # how often an old update is the first that a worker hears that was started again
FATES = {  # of a control message, percent
    "lose the answer": 5,
    "lose the request": 4,  # the connection breaks, and the message arrives later
    "twice": 8,
    "delay": 6,
    "replay": 20,  # some that were said before follow it
}

Message = TypeVar("Message")


class Mischief(Generic[Message]):
    """Decides by dice, and remembers what was said."""

    def __init__(self, random: Random, verb: Callable[[Message], str]) -> None:
        self.random = random
        self.counts: Counter[str] = Counter()
        self._verb = verb
        self._said: deque[Message] = deque(maxlen=RECORDED)

    def remember(self, message: Message) -> None:
        """Record what may be said again at any later time."""
        if self._verb(message) in CONTROL:
            self._said.append(message)

    def fate(self, message: Message) -> str:
        """What happens to this message; "" for nothing."""
        if self._verb(message) not in CONTROL:
            return ""
        self.counts["messages"] += 1
        dice = self.random.uniform(0, 100)
        for fate, percent in FATES.items():
            dice -= percent
            if dice < 0:
                self.counts[f"messages: {fate}"] += 1
                return fate
        return ""

    def later_s(self) -> float:
        """When a message comes that was held back."""
        return self.random.uniform(0, LATER_S)

    def run(self) -> list[Message]:
        """A few old messages that followed each other, mostly new ones, or one update from its very begin."""
        said = list(self._said)
        if self.random.random() < 0.2:
            return self.update()
        begin = self.random.choice([self.random.randrange(len(said) + 1), max(0, len(said) - 8)])
        return said[begin : begin + self.random.randint(1, 5)]

    def update(self) -> list[Message]:
        """What a worker that knows nothing needs to take an old version: a trainer's first message, and one update."""
        said = list(self._said)
        inits = [index for index, message in enumerate(said) if self._verb(message) == INIT]
        starts = [index for index, message in enumerate(said) if self._verb(message) == START]
        if not inits or not starts:
            return []
        start = self.random.choice(starts[-6:])
        init = max((index for index in inits if index < start), default=inits[0])
        return [said[init], *said[start : start + len(UPDATE)]]

    def after_restart(self) -> list[Message]:
        """What reaches a worker that was just started again, before anything new does."""
        return self.update() if self.random.random() < AFTER_RESTART else []
