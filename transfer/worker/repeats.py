"""Lines of a log that come again and again are counted in place of written."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable

PERIOD_S = 60.0


class Repeats(logging.Filter):
    """Lets a line of these loggers through once in PERIOD_S; what is filled in is not compared."""

    def __init__(self, loggers: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()  # other threads may use these loggers, too
        self._since: dict[tuple[str, str], float] = {}
        self._left_out: Counter[tuple[str, str]] = Counter()
        for name in loggers:
            logging.getLogger(name).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        if hasattr(record, "counted"):
            return True
        line = record.name, str(record.msg).partition("\n")[0]
        with self._lock:
            is_new = line not in self._since
            if is_new:
                self._since[line] = self._clock()
            else:
                self._left_out[line] += 1
        return is_new

    def tell(self) -> None:
        """Write how often lines were left out whose period is over."""
        with self._lock:
            over = [line for line, since in self._since.items() if self._clock() - since >= PERIOD_S]
            counts = [(line, self._left_out.pop(line, 0)) for line in over]
            for line in over:
                del self._since[line]
        for (name, text), left_out in counts:
            if left_out:
                logging.getLogger(name).warning(
                    "%s (%d more times in %.0f s)", text, left_out, PERIOD_S, extra={"counted": True}
                )
