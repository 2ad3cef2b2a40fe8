"""Lines of a log that come again and again are counted in place of written."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

PERIOD_S = 60.0


class Repeats(logging.Filter):
    """Lets a line of these loggers through once in PERIOD_S; what is filled in is not compared."""

    def __init__(self, loggers: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._since: dict[tuple[str, str], float] = {}
        self._left_out: dict[tuple[str, str], int] = {}
        for name in loggers:
            logging.getLogger(name).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        line = record.name, str(record.msg).partition("\n")[0]
        if line not in self._since:
            self._since[line], self._left_out[line] = self._clock(), 0
            return True
        self._left_out[line] += not hasattr(record, "counted")
        return hasattr(record, "counted")

    def tell(self) -> None:
        """Write how often lines were left out whose period is over."""
        for line in [line for line, since in self._since.items() if self._clock() - since >= PERIOD_S]:
            del self._since[line]
            if left_out := self._left_out.pop(line):
                logging.getLogger(line[0]).warning(
                    "%s (%d more times in %.0f s)", line[1], left_out, PERIOD_S, extra={"counted": True}
                )
