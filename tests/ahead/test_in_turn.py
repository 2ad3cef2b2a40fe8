"""A reward and an environment that the trainer's thread and those of requests ask at the same time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from rlhf.ahead.in_turn import RewardInTurn
from rlhf.tasks import Replies
from rlhf.tasks.tokenised import TokenisedReplies
from rlhf.types import Prompt, RewardReport


class Alone:
    """A reward and an environment; fails if a call comes while another is at it."""

    def __init__(self):
        self.report = RewardReport()
        self._free = threading.Lock()

    def _work(self):
        assert self._free.acquire(blocking=False), "two at once"
        time.sleep(0.005)
        self._free.release()

    def __call__(self, prompts, answers):
        self.report = RewardReport(errors=0)
        self._work()
        self.report.errors += len(answers)
        return [1.0] * len(answers)

    def reply(self, prompt, answers):
        self._work()
        return answers[-1]


def test_threads_ask_a_reward_one_after_the_other_and_each_hears_what_was_noted_in_its_own_call():
    reward, prompt = RewardInTurn(Alone()), Prompt("", ())

    def ask(count):
        rewards = reward([prompt] * count, [""] * count)
        time.sleep(0.002)
        return len(rewards), reward.report.errors

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(1, 25))) == [(count, count) for count in range(1, 25)]
    assert reward.report is None, "this thread has not asked"
    assert RewardInTurn(lambda prompts, answers: [0.0])([prompt], [""]) == [0.0]


def test_threads_ask_an_environment_one_after_the_other():
    replies = Replies(2, lambda columns, answers: columns["alone"].reply(columns, answers), "", "")
    environment, prompt = TokenisedReplies(replies, None), Prompt("", (), {"alone": Alone()})

    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(lambda number: environment.reply(prompt, [str(number)]), range(20))
        assert list(asked) == [str(number) for number in range(20)]
