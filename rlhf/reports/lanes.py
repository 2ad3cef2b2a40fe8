"""Who did what when, read back from a run's `lanes.jsonl`: the trainer's phases, and when a worker had a request.

    {"step": 3, "until": 2.5, "lanes": {"trainer": [["sample", 1.2, 1.9], ["learn", 1.9, 2.5]], "worker 0": [...]}}

A line a step, in seconds since the run's begin; the time between a stop and a resume is left out. Of a long run the
first line, `{"before": ...}`, sums up those that were there before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.reports.summary import is_number

FILE = "lanes.jsonl"  # of a run
TRAINER = "trainer"
SAMPLE = "sample"  # of a worker: it has a request; of the trainer: it waits for samples
LONGEST_S = 1e9  # that a run takes
GONE = 3  # steps without a request, after which a worker counts as gone

Span = tuple[str, float, float]  # what, when it began, when it ended


@dataclass(frozen=True, slots=True)
class Line:
    """What was noted since the line before."""

    step: int
    until: float
    spans: Mapping[str, Sequence[Span]]  # by lane


@dataclass(slots=True)
class Sum:
    """One lane: when it was first and last heard of, and its seconds by what it did."""

    since: float
    until: float
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Before:
    """Lines that are gone, as sums; the first step is in none of them."""

    step: int
    since: float
    until: float
    lanes: dict[str, Sum] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class History:
    """A run's lanes."""

    lines: Sequence[Line] = ()
    before: Before | None = None

    @property
    def until(self) -> float:
        """The end of what is known."""
        return self.lines[-1].until if self.lines else self.before.until if self.before else 0.0

    def up_to(self, step: int) -> History:
        """The same without what was noted after this step."""
        before = self.before if self.before and self.before.step <= step else None
        return History([line for line in self.lines if line.step <= step], before)


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the time after the first step: what the trainer did, and how long each worker had no request."""

    seconds: float
    trainer: Mapping[str, float]  # by phase
    idle: Mapping[str, float]  # by worker
    workers: int = 0  # that have had requests lately


def summed(history: History) -> Before | None:
    """All lines as sums; None before a second step."""
    if history.before is None and not history.lines:
        return None
    first, rest = history.before, history.lines
    if first is None:  # the end of the first step is where sums begin
        first = Before(rest[0].step, rest[0].until, rest[0].until)
    lanes = {lane: Sum(each.since, each.until, dict(each.seconds)) for lane, each in first.lanes.items()}
    for lane in dict.fromkeys(lane for line in rest for lane in line.spans):
        spans = [span for line in rest for span in line.spans.get(lane, ())]
        known = lanes.setdefault(lane, Sum(max(first.since, min(began for _, began, _ in spans)), first.until))
        known.until = max(known.until, *(ended for _, _, ended in spans))
        for what, began, ended in merged([(w, max(b, first.until), e) for w, b, e in spans if e > first.until]):
            known.seconds[what] = known.seconds.get(what, 0.0) + ended - began
    return Before(history.lines[-1].step if rest else first.step, first.since, max(history.until, first.until), lanes)


def shares(history: History) -> Shares | None:
    """How the time was spent; None before a second step."""
    sums = summed(history)
    if sums is None or not sums.until > sums.since:
        return None
    seconds = sums.until - sums.since
    trainer = sums.lanes.get(TRAINER, Sum(0.0, 0.0)).seconds
    lately = {lane for line in history.lines if line.step > sums.step - GONE for lane in line.spans}
    idle = {}
    for lane in in_order(lane for lane in sums.lanes if lane != TRAINER):
        one = sums.lanes[lane]
        there = (sums.until if lane in lately else one.until) - one.since
        idle[lane] = 1 - min(1.0, one.seconds.get(SAMPLE, 0.0) / there) if there > 0 else 1.0
    there_now = len(lately & idle.keys())
    return Shares(seconds, {what: spent / seconds for what, spent in trainer.items()}, idle, there_now)


def merged(spans: Iterable[Span], gap: float = 0.0) -> list[Span]:
    """In the order of time; those of one kind that overlap, or have no more than `gap` between them, are one."""
    done: list[Span] = []
    newest: dict[str, int] = {}  # where the last of each kind is
    for what, began, ended in sorted(spans, key=lambda span: span[1]):
        place = newest.get(what)
        if place is not None and began <= done[place][2] + gap:
            done[place] = (what, done[place][1], max(ended, done[place][2]))
        else:
            newest[what] = len(done)
            done.append((what, began, ended))
    return done


def in_order(lanes: Iterable[str]) -> list[str]:
    """The trainer, then the workers by their numbers."""

    def place(lane: str) -> tuple[bool, int, str]:
        number = lane.rpartition(" ")[2]
        return lane != TRAINER, int(number) if number.isdecimal() and len(number) < 9 else 10**9, lane

    return sorted(lanes, key=place)


# --- the file ---------------------------------------------------------------------------------------------------------


def history(rows: Sequence[Mapping[str, Any]]) -> History:
    """What the file's rows say, up to one that is none of a run's."""
    before = _before(rows[0].get("before")) if rows else None
    lines: list[Line] = []
    for row in rows[1 if before else 0 :]:
        line = _line(row)
        if line is None:
            break
        lines.append(line)
    return History(lines, before)


def as_row(line: Line) -> dict[str, Any]:
    """The inverse, of a line; times to a tenth of a millisecond."""
    spans = {
        lane: [[what, round(began, 4), round(ended, 4)] for what, began, ended in told]
        for lane, told in line.spans.items()
    }
    return {"step": line.step, "until": round(line.until, 4), "lanes": spans}


def before_as_row(before: Before) -> dict[str, Any]:
    """The inverse, of sums."""
    lanes = {lane: {"since": s.since, "until": s.until, "seconds": s.seconds} for lane, s in before.lanes.items()}
    return {"before": {"step": before.step, "since": before.since, "until": before.until, "lanes": lanes}}


def _line(row: Mapping[str, Any]) -> Line | None:
    told = row.get("lanes")
    if not (_is_time(row.get("step")) and _is_time(row.get("until")) and isinstance(told, dict)):
        return None
    if not all(isinstance(spans, list) and spans and all(map(_is_span, spans)) for spans in told.values()):
        return None
    spans = {lane: [(what, began, ended) for what, began, ended in each] for lane, each in told.items()}
    return Line(int(row["step"]), row["until"], spans)


def _is_span(span: Any) -> bool:
    if not (isinstance(span, list) and len(span) == 3 and isinstance(span[0], str)):
        return False
    return _is_time(span[1]) and _is_time(span[2]) and span[1] <= span[2]


def _is_time(value: Any) -> bool:
    return is_number(value) and 0 <= value <= LONGEST_S


def _before(told: Any) -> Before | None:
    if not (isinstance(told, dict) and all(_is_time(told.get(key)) for key in ("step", "since", "until"))):
        return None
    lanes = told.get("lanes")
    if not (isinstance(lanes, dict) and all(map(_is_sum, lanes.values()))):
        return None
    sums = {lane: Sum(each["since"], each["until"], dict(each["seconds"])) for lane, each in lanes.items()}
    return Before(int(told["step"]), told["since"], told["until"], sums)


def _is_sum(told: Any) -> bool:
    if not (isinstance(told, dict) and _is_time(told.get("since")) and _is_time(told.get("until"))):
        return False
    return isinstance(told.get("seconds"), dict) and all(map(_is_time, told["seconds"].values()))
