"""Which prompts may be drawn and which groups are learned from: none is lost, none twice, none too old."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ahead.slots import Slots
from rlhf.gather import Group
from rlhf.types import Prompt


def whole(slot):
    slot.asked, slot.group = True, Group(Prompt("", (1,)), slot.index, [], [], [], [])


@given(st.data(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9), st.integers(1, 8))
def test_every_prompt_is_learned_from_once_and_no_later_than_its_lag_allows(data, size, lag, window, steps):
    slots = Slots(size, lag, steps * size, window)
    draw = lambda choices: data.draw(st.sampled_from(choices))  # noqa: E731
    slots.admit()
    since = dict.fromkeys((slot.index for slot in slots.held), 0)  # the steps that had been released at admission
    left_out, learned = set(), []
    for step in range(steps):
        while slots.take() is None:
            running = [slot for slot in slots.held if slot.group is None]
            assert running, "it waits, and nothing is there to wait for"
            slot = draw(running)
            if len(left_out) < 10 and draw([True, False, False]):
                slots.leave_out(slot)
                left_out.add(slot.index)
                slots.admit()
                since |= {slot.index: step for slot in slots.held if slot.index not in since}
            else:
                whole(slot)
        taken = [slot.index for slot in slots.taken]
        assert len(taken) == size and taken == sorted(taken)
        assert max(step - since[index] for index in taken) <= lag + -(-window // size)
        learned += taken
        slots.release()
        assert len(slots.held) <= (lag + 1) * size
        since |= {slot.index: step + 1 for slot in slots.held if slot.index not in since}
    assert len(set(learned)) == len(learned) == steps * size and not left_out & set(learned)
    assert set(learned) | left_out == set(range(slots.next)) and not slots.held
    assert window or learned == sorted(learned)


def test_the_oldest_groups_are_next_and_a_window_lets_others_overtake_a_slow_one():
    for window, first in ((0, None), (1, None), (2, [1, 2]), (3, [1, 2])):
        slots = Slots(2, 1, 20, window)
        slots.admit()
        for slot in slots.held[1:]:
            whole(slot)
        taken = slots.take()
        assert (None if taken is None else [slot.index for slot in taken]) == first, window
    whole(slots.held[0])
    assert [slot.index for slot in slots.take()] == [0, 1]


def test_a_step_keeps_its_slots_until_it_is_released():
    slots = Slots(2, 1, 6)
    slots.admit()
    assert [slot.index for slot in slots.waiting()] == [0, 1, 2, 3]
    for slot in slots.held:
        whole(slot)
    slots.take()
    slots.admit()
    assert slots.whole == 2 and slots.next == 4
    slots.release()
    assert [slot.index for slot in slots.held] == [2, 3, 4, 5] and [slot.index for slot in slots.waiting()] == [4, 5]
    slots.take()
    slots.release()
    assert [slot.index for slot in slots.held] == [4, 5], "a run draws nothing that it does not learn from"


@pytest.mark.parametrize("window", [0, 7])
def test_a_group_that_is_left_out_gives_its_slot_to_the_next_prompt(window):
    slots = Slots(3, 2, 300, window)
    slots.admit()
    for _ in range(50):
        slots.leave_out(slots.held[0])
        slots.admit()
        assert len(slots.held) == 9
    assert [slot.index for slot in slots.held] == list(range(50, 59)) and slots.left_out == 50
