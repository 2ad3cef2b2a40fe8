"""What a check is and what comes of it; standard library only."""

from __future__ import annotations

import subprocess
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transfer.agreement.shown import printable

OK, WARN, FAIL, SKIP, LATE = "ok", "warn", "fail", "skip", "late"
MAX_REASON = 400  # characters of one reason


@dataclass(frozen=True, slots=True)
class Check:
    """A function to run, `target` as "module:function", with these arguments; checks of one lane share a process."""

    name: str
    group: str
    lane: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)  # JSON
    deadline_s: float = 10.0
    needs: tuple[str, ...] = ()  # checks without which this one makes no sense
    do: str = ""  # what to do if it fails
    skip: str = ""  # why it is not run


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check saw, in one line, and what to do about it."""

    status: str
    seen: str
    do: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)  # JSON; figures for machines


@dataclass(frozen=True, slots=True)
class Result:
    """A finding with the check that it is of, and the seconds that it took."""

    check: Check
    finding: Finding
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        """Whether what was checked can be used."""
        return self.finding.status in (OK, WARN)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        check, finding = self.check, self.finding
        return {
            "name": check.name,
            "group": check.group,
            "status": finding.status,
            "seen": finding.seen,
            "do": finding.do,
            "seconds": round(self.seconds, 3),
            "arguments": dict(check.arguments),
            "data": dict(finding.data),
        }


class Problem(Exception):
    """A check's own words for what does not work, and for what to do."""

    def __init__(self, seen: str, do: str = "") -> None:
        super().__init__(seen)
        self.seen = seen
        self.do = do


def ok(seen: str, **data: Any) -> Finding:
    """It works."""
    return Finding(OK, seen, data=data)


def warn(seen: str, do: str, **data: Any) -> Finding:
    """It works, but."""
    return Finding(WARN, seen, do, data)


def skip(seen: str, **data: Any) -> Finding:
    """There is nothing to check here."""
    return Finding(SKIP, seen, data=data)


def late(why: str) -> Finding:
    """Nobody knows whether it works: there was no time to see it."""
    return Finding(LATE, one_line(f"not tried: no time ({why})"), "run it again, with a longer --deadline")


def timed_out(error: BaseException | None) -> bool:
    """Whether an exception, or what it came from, is a deadline that has passed."""
    while error is not None:
        if isinstance(error, TimeoutError | subprocess.TimeoutExpired):
            return True
        error = error.__cause__ or error.__context__
    return False


def failed(error: BaseException) -> Finding:
    """What an exception says, in one line: of several, the first and the last."""
    if isinstance(error, Problem):
        return Finding(FAIL, one_line(error.seen), error.do)
    seen = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, OSError) and error.filename is None:  # the system's bare words: say what was asked of it
        seen += f", at `{traceback.extract_tb(error.__traceback__)[-1].line}`"
    return Finding(FAIL, one_line(seen))


def one_line(text: str) -> str:
    """A text's first and last line as one, cut to a readable length, and safe on a terminal."""
    lines = [line.strip() for line in printable(text).splitlines() if line.strip()] or ["no reason given"]
    whole = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    return whole if len(whole) <= MAX_REASON else f"{whole[: MAX_REASON // 2]} ... {whole[-MAX_REASON // 2 :]}"
