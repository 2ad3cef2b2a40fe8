"""Completions that share the steps of one engine: who steps, what each gets, and what becomes of new weights."""

import gc
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.rollout.engine import Turn
from rlhf.rollout.stepping import Stepping
from transfer.worker.gate import Gate

DEADLINE_S = 30.0


@dataclass
class Output:
    request_id: str
    version: int  # of the weights during the step
    finished: bool


@dataclass
class FakeEngine:
    """Gives each request a token a step, as many as its name says ("4:...": four); notes who steps and what is left."""

    gate: Gate = field(default_factory=Gate)
    version: int = 0  # of the weights
    step_s: float = 0.0
    fails_at: int | None = None
    steps: int = 0
    left: dict = field(default_factory=dict)
    ended: list = field(default_factory=list)
    changes: int = 0  # of weights that requests have seen
    busy: threading.Lock = field(default_factory=threading.Lock)

    def step(self):
        assert self.busy.acquire(blocking=False), "one step at a time"
        try:
            self.steps += 1
            if self.steps == self.fails_at:
                raise OSError("the device is gone")
            time.sleep(self.step_s)
            outputs = []
            for name in list(self.left):
                self.left[name] -= 1
                outputs.append(Output(name, self.version, not self.left[name]))
                if not self.left[name]:
                    del self.left[name]
                    self.ended.append(name)
            return outputs
        finally:
            self.busy.release()

    def progress(self):
        assert not self.busy.locked()
        return {name: int(name.split(":")[0]) - left for name, left in self.left.items()}

    def changed(self):
        assert self.left and not self.busy.locked()
        self.changes += 1

    def give(self, names):
        assert self.busy.acquire(blocking=False), "no request comes while somebody steps"
        for name in names:
            self.left[name] = int(name.split(":")[0])
        self.busy.release()

    def abort_request(self, names):
        assert self.busy.acquire(blocking=False), "no request goes while somebody steps"
        for name in names:
            del self.left[name]
        self.busy.release()

    @property
    def turn(self):
        """What a completion asks that keeps going when weights change."""
        return Turn(self.take, lambda: self.gate.wanted)

    def take(self):
        if self.gate.wanted:
            self.gate.give_way(DEADLINE_S)
        return self.version

    def flip(self):
        with self.gate.exclusive(DEADLINE_S):
            self.version += 1


def complete(stepping, engine, names, take=None, started=None):
    """The versions of each row's tokens, cut where `take` says None, which is asked before each step."""
    rows = [[] for _ in names]
    with engine.gate.shared(DEADLINE_S), stepping.joined(engine.turn if take is None else Turn(take)) as part:
        if part.ready() is None:
            return rows
        part.submit({name: row for row, name in enumerate(names)}, lambda: engine.give(names))
        if started is not None:
            started.set()
        while part.rows and (outputs := part.step()) is not None:
            for row, output in outputs:
                assert output.version == part.version, "no version mixes within a step"
                rows[row].append(output.version)
    return rows


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def made(**settings):
    engine = FakeEngine(**settings)
    return Stepping(engine), engine


def test_a_completion_alone_steps_until_its_rows_are_done():
    stepping, engine = made()
    assert complete(stepping, engine, ["3:a", "1:b"]) == [[0, 0, 0], [0]]
    assert (engine.steps, engine.left) == (3, {})


def test_a_short_completion_that_comes_second_ends_first(pool):
    stepping, engine = made(step_s=0.002)
    began = threading.Event()
    long = pool.submit(complete, stepping, engine, ["300:long"], None, began)
    assert began.wait(DEADLINE_S)
    assert pool.submit(complete, stepping, engine, ["4:short", "2:short"]).result(DEADLINE_S) == [[0] * 4, [0] * 2]
    assert not long.done() and "300:long" in engine.left
    assert long.result(DEADLINE_S) == [[0] * 300]
    assert engine.steps == 300, "the short one has shared steps"


def test_new_weights_come_in_between_two_steps_of_several_completions(pool):
    stepping, engine = made(step_s=0.001)
    began = [threading.Event() for _ in range(3)]
    calls = [pool.submit(complete, stepping, engine, [f"200:{i}"], None, event) for i, event in enumerate(began)]
    assert all(event.wait(DEADLINE_S) for event in began)
    start = time.monotonic()
    for _ in range(5):
        engine.flip()
    assert time.monotonic() - start < DEADLINE_S / 2, "nobody waits for a deadline"
    seen = [call.result(DEADLINE_S)[0] for call in calls]
    for versions in seen:
        assert len(versions) == 200 and versions == sorted(versions) and versions[-1] == 5
    assert max(len(set(versions)) - 1 for versions in seen) <= engine.changes <= 5


def test_an_engine_hears_of_new_weights_only_where_requests_have_seen_others():
    stepping, engine = made()
    complete(stepping, engine, ["3:a"])
    engine.flip()
    complete(stepping, engine, ["3:b"])
    assert engine.changes == 0
    versions = iter([1, 1, 1, 2, 2, 3, 3])
    (row,) = complete(stepping, engine, ["4:c"], lambda: setattr(engine, "version", next(versions)) or engine.version)
    assert row == [1, 1, 2, 2] and engine.changes == 1


def test_a_completion_that_is_told_to_end_leaves_the_others_alone(pool):
    stepping, engine = made(step_s=0.001)
    began = threading.Event()
    other = pool.submit(complete, stepping, engine, ["100:other"], None, began)
    assert began.wait(DEADLINE_S)
    turns = iter([0, 0, 0, 0])
    (cut,) = complete(stepping, engine, ["100:cut"], lambda: next(turns, None))
    assert len(cut) < 4 and "100:cut" not in engine.left and "100:other" in engine.left
    assert other.result(DEADLINE_S) == [[0] * 100]


def test_a_completion_that_may_not_begin_gives_the_engine_nothing():
    stepping, engine = made()
    assert complete(stepping, engine, ["1:a"], lambda: None) == [[]]
    assert engine.steps == 0


def test_what_a_step_raises_reaches_all_whose_step_it_was_and_the_next_completions_go_on(pool):
    stepping, engine = made(step_s=0.001, fails_at=40)
    began = [threading.Event() for _ in range(2)]
    calls = [pool.submit(complete, stepping, engine, [f"200:{i}"], None, event) for i, event in enumerate(began)]
    for call in calls:
        with pytest.raises(OSError, match="the device is gone"):
            call.result(DEADLINE_S)
    assert engine.left == {}, "their requests are aborted"
    assert complete(stepping, engine, ["2:after"]) == [[0, 0]]


def test_a_completion_whose_turn_raises_takes_its_rows_along(pool):
    stepping, engine = made(step_s=0.001)
    began = threading.Event()
    other = pool.submit(complete, stepping, engine, ["60:other"], None, began)
    assert began.wait(DEADLINE_S)
    turns = iter([0, 0])

    def refused():
        if (version := next(turns, None)) is None:
            raise ValueError("no weights to serve")
        return version

    with pytest.raises(ValueError, match="no weights"):
        complete(stepping, engine, ["60:cut"], refused)
    assert other.result(DEADLINE_S) == [[0] * 60] and engine.left == {}


def test_requests_that_the_engine_does_not_take_whole_are_aborted():
    stepping, engine = made()

    def half():
        engine.give(["3:a", "3:b"])
        raise ValueError("too long")

    with pytest.raises(ValueError, match="too long"), stepping.joined(engine.turn) as part:
        part.ready()
        part.submit({"3:a": 0, "3:b": 1}, half)
    assert engine.left == {}


def test_the_garbage_collector_rests_while_completions_run_and_only_then():
    stepping, engine = made()
    seen = []
    assert complete(stepping, engine, ["2:a"], lambda: seen.append(gc.isenabled()) or 0) == [[0, 0]]
    assert not any(seen) and gc.isenabled()
    gc.disable()
    try:
        complete(stepping, engine, ["2:a"])
        assert not gc.isenabled(), "as it was"
    finally:
        gc.enable()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_any_schedule_ends_with_every_row_whole_or_cut_where_it_was_told(seed):
    draw = random.Random(seed)
    stepping, engine = made(step_s=draw.choice([0, 0.0005]))
    stopped = threading.Event()

    def flips():
        while not stopped.wait(draw.choice([0, 0.001, 0.004])):
            engine.flip()

    def call(number, plan):
        time.sleep(plan["after"])
        left = [plan["turns"]]

        def turn():
            left[0] -= 1
            return None if left[0] < 0 else engine.take()

        names = [f"{length}:{number}.{row}" for row, length in enumerate(plan["lengths"])]
        rows = complete(stepping, engine, names, turn)
        for length, versions in zip(plan["lengths"], rows, strict=True):
            assert versions == sorted(versions) and len(versions) <= length
            assert len(versions) == length or left[0] < 0
        return number

    plans = [
        {
            "after": draw.random() * 0.01,
            "turns": draw.choice([1, 5, 10**6, 10**6]),
            "lengths": [draw.randint(1, 30) for _ in range(draw.randint(1, 3))],
        }
        for _ in range(draw.randint(2, 6))
    ]
    with ThreadPoolExecutor(len(plans) + 1) as pool:
        flipping = pool.submit(flips)
        try:
            done = [pool.submit(call, number, plan) for number, plan in enumerate(plans)]
            assert [each.result(DEADLINE_S) for each in done] == list(range(len(plans)))
        finally:
            stopped.set()
        flipping.result(DEADLINE_S)
    assert engine.left == {} and gc.isenabled()
