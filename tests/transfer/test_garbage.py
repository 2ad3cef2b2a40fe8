"""The garbage collector rests as long as anybody asks for it, whoever began and whoever ends first."""

import gc
import threading
from contextlib import nullcontext

import pytest

from rlhf.rollout.stepping import COLLECT_STEPS, Collector
from transfer.memory.one_pass import uncollected


@pytest.fixture(autouse=True)
def collecting():
    """A collector that works, before and after."""
    assert gc.isenabled()
    yield
    gc.enable()


def overlapping(first, second):
    """What two threads do whose blocks overlap: whether the collector worked after the first's end, and after both."""
    seen, began, ended = [], threading.Event(), threading.Event()

    def other():
        with second:
            began.set()
            assert ended.wait(60)
            seen.append(gc.isenabled())

    thread = threading.Thread(target=other)
    with first:
        thread.start()
        assert began.wait(60)
    ended.set()
    thread.join(60)
    return [*seen, gc.isenabled()]


class Completions:
    """A worker's requests, for as long as a block."""

    def __init__(self):
        self.collector = Collector()

    def __enter__(self):
        self.collector.rest()

    def __exit__(self, *_):
        self.collector.go_on()


@pytest.mark.parametrize("second", [uncollected, Completions])
@pytest.mark.parametrize("first", [uncollected, Completions])
def test_of_two_that_let_the_collector_rest_the_one_that_ends_first_does_not_wake_it(first, second):
    assert overlapping(first(), second()) == [False, True]


def test_the_collector_rests_on_where_it_did_before():
    gc.disable()
    assert overlapping(uncollected(), uncollected()) == [False, False]


def test_an_error_ends_the_rest():
    with pytest.raises(ZeroDivisionError), uncollected():
        raise ZeroDivisionError
    assert gc.isenabled()


@pytest.mark.parametrize("recording", [True, False])
def test_what_is_collected_every_so_many_steps_waits_while_work_is_recorded(recording):
    seen, asked = [], Completions()
    gc.callbacks.append(lambda phase, info: seen.append(phase))
    try:
        with asked, uncollected() if recording else nullcontext():
            seen.clear()
            for _ in range(COLLECT_STEPS):
                asked.collector.stepped()
            counted = list(seen)
    finally:
        gc.callbacks.pop()
    assert counted == ([] if recording else ["start", "stop"])
