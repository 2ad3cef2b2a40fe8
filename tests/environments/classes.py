"""Environments of tests: what people write, and what can go wrong with it."""

import asyncio
import os
import re
import sys
import time


class Sleeper:
    """Takes as long as its row says, each turn; the action is what it was told last."""

    def reset(self, delays):
        self._delays = list(delays)

    async def step(self, action):
        await asyncio.sleep(self._delays.pop(0))
        return action.upper(), 1.0, not self._delays


class Mischief:
    """Does to its second turn what its row says."""

    def reset(self, does, **row):
        self._does, self._turn = does, 0
        if does == "raise at reset":
            raise RuntimeError("no board today")
        return 7 if does == "garbage at reset" else None

    def step(self, action):
        self._turn += 1
        if self._turn == 2:
            match self._does:
                case "raise":
                    raise ValueError("not that way")
                case "hang":
                    time.sleep(3600)
                case "die":
                    os._exit(3)
                case "garbage":
                    return "what?"
                case "not a number":
                    return "x", float("nan"), True
        return "go", 0.5, self._turn == 3


class Shop:
    """Tools of several kinds, and a reward."""

    def reset(self, **row):
        self._sold = []
        return f" (for {row['customer']})" if "customer" in row else None

    def price(self, item: str, count: int = 1) -> dict:
        """What items cost.

        Args:
            item: the name of the item
            count: how many of it
        """
        if item == "moon":
            raise KeyError("not for sale")
        return {"total": 3 * count}

    async def sell(self, item: str) -> str:
        """Sell an item.

        Args:
            item: the name of the item
        """
        await asyncio.sleep(0)
        self._sold.append(item)
        return f"sold {item}"

    def get_reward(self):
        return float(len(self._sold))


def add(left: int, right: int) -> int:
    """Add two numbers.

    Args:
        left: one of them
        right: the other one
    """
    return left + right


class Untyped:
    def look(self, where):
        """Look somewhere."""


class Undocumented:
    def look(self, where: str) -> str:
        return where


class Empty:
    pass


class Hostile:
    """Does at reset, or as a tool, what no process or thread beside it should suffer from."""

    def reset(self, does, **row):
        if does == "hog":
            re.match(r"(a+)+$", "a" * 60 + "b")  # never lets another thread run

    def step(self, action):
        return "go", 1e308, False


class Tools:
    def leave(self) -> str:
        """End the process."""
        sys.exit(3)

    def nothing(self) -> str:
        """Take what is not there."""
        return next(iter(()))

    def half(self) -> str:
        """Say half a character."""
        return "\ud800"

    def fine(self) -> str:
        """Say something."""
        return "fine"


class Speaker:
    """Says much at reset, if it is to, and a little after each action."""

    def reset(self, does):
        return "go" * (50 if does == "long" else 1)

    def step(self, action):
        return "go", 1.0, False


class Crowd:
    """Tells how many take a step at the same time."""

    there = 0

    def reset(self, **row): ...
    async def step(self, action):
        Crowd.there += 1
        seen = Crowd.there
        await asyncio.sleep(0.05)
        Crowd.there -= 1
        return "", float(seen), True


class Still:
    def reset(self, **row): ...
    def step(self): ...
