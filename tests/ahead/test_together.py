"""Rewards that many requests wait for are asked for in one batch."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf.ahead.together import Together
from rlhf.types import Completion, Prompt, RewardReport, Rollouts

WAIT_S = 20.0


def samples(*texts: str) -> Rollouts:
    rows = [Completion([7], [-0.5], [0], "stop") for _ in texts]
    return Rollouts([Prompt(text, (1,)) for text in texts[::2]], rows, list(texts), list(range(len(texts) // 2)), 2)


class Judge:
    """A reward that says how long a text is, and which is kept waiting in its first call."""

    def __init__(self):
        self.calls, self.inside, self.go_on, self.fails = [], threading.Event(), threading.Event(), False

    def __call__(self, rollouts):
        self.calls.append(list(rollouts.texts))
        self.inside.set()
        assert self.go_on.wait(WAIT_S)
        if self.fails:
            raise ZeroDivisionError
        report = RewardReport(means={"length": 2.0}, errors=3, error="no answer", counts={"clipped": 1})
        return [float(len(text)) for text in rollouts.texts], report


def test_what_comes_while_the_reward_is_asked_is_asked_for_together_and_each_gets_its_own():
    judge = Judge()
    together = Together(judge)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(together, samples("a", "bb"))
        assert judge.inside.wait(WAIT_S)
        others = [pool.submit(together, samples("c" * n, "d", "e", "f" * n)) for n in range(3, 8)]
        deadline = time.monotonic() + WAIT_S
        while len(together._waiting) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        judge.go_on.set()
        assert first.result(WAIT_S)[0] == [1.0, 2.0]
        said = [other.result(WAIT_S) for other in others]
    assert [rewards for rewards, _ in said] == [[float(n), 1.0, 1.0, float(n)] for n in range(3, 8)]
    assert len(judge.calls) == 2 and len(judge.calls[1]) == 20
    reports = [report for _, report in said]
    assert all(report.means == {"length": 2.0} for report in reports), "each step has some"
    assert sum(report.errors for report in reports) == 3 and sum(map(len, (r.counts for r in reports))) == 1


def test_an_error_of_the_reward_reaches_all_that_it_was_asked_for_and_no_others():
    judge = Judge()
    together, judge.fails = Together(judge), True
    judge.go_on.set()
    with pytest.raises(ZeroDivisionError):
        together(samples("a", "b"))
    judge.fails = False
    assert together(samples("a", "bb"))[0] == [1.0, 2.0]
