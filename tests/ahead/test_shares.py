"""A group's samples drawn by several workers: the same samples, and it is whole when all shares are there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ahead.shares import Shares
from rlhf.ahead.slots import Slot
from rlhf.config.rollout import AheadConfig
from rlhf.gather import Group
from rlhf.types import Completion, Prompt
from tests.ahead.test_free import House, make, step  # noqa: F401


@given(st.integers(1, 32), st.integers(1, 9))
def test_shares_are_of_equal_size_and_no_more_than_there_are_workers(samples, workers):
    shares = Shares.of(samples, workers)
    assert shares.count * shares.rows == samples and 1 <= shares.count <= workers


def drawn(first, rows, texts=None):
    completions = [Completion([first + row], None, [1], "stop") for row in range(rows)]
    return Group(Prompt("", (1,)), 7, completions, texts or ["x"] * rows, [], [None] * rows)


def test_a_group_is_whole_with_its_last_share_and_has_its_samples_in_order():
    shares, slot = Shares.of(6, 3), Slot(0)
    units = list(shares.waiting([slot]))
    assert [first for _, first in units] == [0, 2, 4]
    shares.ask(units[:2])
    assert [first for _, first in shares.waiting([slot])] == [4] and not slot.asked
    shares.give_back(units[:1])
    assert [first for _, first in shares.waiting([slot])] == [0, 4]
    shares.ask([units[0], units[2]])
    assert slot.asked and shares.came([units[2]], [drawn(4, 2)]) == []
    assert shares.came([units[0]], [drawn(0, 2)]) == []
    ((whole, group),) = shares.came([units[1]], [drawn(2, 2)])
    assert whole is slot and [row.ids[0] for row in group.completions] == [0, 1, 2, 3, 4, 5]


def test_a_queue_that_spreads_groups_asks_every_worker_for_a_share_of_each(make):  # noqa: F811
    house = House()
    queue, _ = make(house, "rollout.ahead.spread=true", "samples_per_prompt=4")
    rollouts, rewards = step(queue, house, 1)
    assert rollouts.samples_per_prompt == 4 and len(rollouts.texts) == len(rewards) == 16
    prompts = {prompt.ids[0] for prompt in rollouts.prompts}
    by_worker = {name: [p for asked, ps in house.asked if asked == name for p in ps] for name in "ab"}
    assert all(sum(ps.count(prompt) for ps in by_worker.values()) == 2 for prompt in prompts), "two shares of each"


def test_groups_cannot_be_spread_in_exact_order():
    with pytest.raises(ValueError, match=r"rollout\.ahead\.spread=true"):
        AheadConfig(spread=True, lag=1)
