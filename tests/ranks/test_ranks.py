"""What ranks do together: shares, sums in their order, what the first hears; and one that is gone ends all, named."""

from __future__ import annotations

import os
import signal
import time

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from forked_ranks import Pool, pool
from hypothesis import given, settings

from rlhf.learning.gradient_sums import add_rows
from rlhf.ranks.meeting import _process_group
from rlhf.ranks.ranks import ALONE, Ranks
from rlhf.shell.ending import RunError, unbroken

SOON_S = 20.0  # as soon as one can ask for on a busy machine; who waits for nothing takes 60
KILLED = "rank {} of the trainer has ended without a word: was it killed, or out of memory?"


class Of(Ranks):
    """A rank that computes by itself."""

    def __init__(self, number: int, count: int) -> None:
        super().__init__()
        self.number, self.count = number, count


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_are_contiguous_cover_all_parts_once_and_differ_by_one_at_most(parts, count):
    shares = [list(Of(number, count).share(range(parts))) for number in range(count)]
    assert [part for share in shares for part in share] == list(range(parts))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_rank_by_itself_has_everything_and_waits_for_nobody():
    assert ALONE.first and ALONE.share([1, 2]) == [1, 2] and ALONE.gathered(3) == [3] and ALONE.told(4) == 4
    assert ALONE.heard(lambda: 5, tell=lambda value: 1 / 0) == 5 and ALONE.sums({"a": 0.1}) == {"a": 0.1}


@pytest.fixture(scope="module")
def three():
    with pool(3) as ranks:
        yield ranks


def _said(ranks: Ranks) -> list[object]:
    told = ranks.told({"of": ranks.number})
    heard = ranks.heard(lambda: (ranks.number, "tuple"), list, tuple)
    return [told, heard, ranks.gathered([ranks.number] * ranks.number)]


def test_all_ranks_hear_what_the_first_says_and_what_each_gives_in_their_order(three):
    assert three.call(_said) == 3 * [[{"of": 0}, (0, "tuple"), [[], [1], [2, 2]]]]


def _summed(ranks: Ranks, numbers: list[dict[str, float]]) -> list[tuple[str, float]]:
    return list(ranks.sums(numbers[ranks.number]).items())


@settings(max_examples=25)
@given(st.data())
def test_sums_are_those_of_one_process_that_adds_in_the_order_of_the_ranks(three, data):
    names = st.dictionaries(st.sampled_from("abc"), st.floats(-1e9, 1e9), max_size=3)
    numbers = [data.draw(names) for _ in range(3)]
    expected: dict[str, float] = {}
    for each in numbers:
        for name, value in each.items():
            expected[name] = expected[name] + value if name in expected else value
    assert three.call(_summed, numbers) == 3 * [list(expected.items())]


def test_a_nan_of_one_rank_alone_is_the_sum_of_all_so_that_all_skip_the_step(three):
    sums = three.call(_summed, [{"loss": 1.0}, {"loss": float("nan")}, {"loss": 2.0}])
    assert [str(dict(each)["loss"]) for each in sums] == 3 * ["nan"]


def _rows_added(ranks: Ranks) -> list[list[float]]:
    rows = torch.zeros(4, 2)
    rows[ranks.number] = torch.tensor([0.1, -1e-30]) * (ranks.number + 1)
    return add_rows(rows, ranks).tolist()


def test_rows_of_different_ranks_come_together_exactly(three):
    expected = torch.zeros(4, 2)
    for number in range(3):
        expected[number] = torch.tensor([0.1, -1e-30]) * (number + 1)
    assert three.call(_rows_added) == 3 * [expected.tolist()]


# --- one that is gone -------------------------------------------------------------------------------------------------


def _asks_outside(ranks: Ranks) -> None:
    ranks.heard(lambda: time.sleep(60))


def _computes(ranks: Ranks) -> None:
    with ranks.explained():
        time.sleep(60)


def _computes_unbroken(ranks: Ranks) -> list[object]:
    done = False
    try:
        with ranks.explained():
            with unbroken():
                time.sleep(1.5 if ranks.first else 60)
                done = True
            time.sleep(60)
    except RunError as error:
        return [done, str(error)]
    return []


def _adds(ranks: Ranks, late: int = -1, seconds: float = 0.0) -> None:
    if ranks.number == late:
        time.sleep(seconds)
    with ranks.explained():
        dist.all_reduce(torch.ones(3))


def _gathers(ranks: Ranks, late: int = -1, seconds: float = 0.0) -> None:
    if ranks.number == late:
        time.sleep(seconds)
    ranks.gathered(None)


def _meets(ranks: Ranks, late: int, seconds: float) -> None:
    dist.destroy_process_group()  # that of the pool
    if ranks.number == late:
        time.sleep(seconds)
    with _process_group(ranks, torch.device("cpu")):
        raise AssertionError("nobody is late")


def _fails(ranks: Ranks, number: int) -> None:
    if ranks.number == number:
        raise ZeroDivisionError("a device-side\nassert")
    _adds(ranks)


def _fails_while_the_first_asks(ranks: Ranks, number: int) -> None:
    if ranks.number == number:
        raise ValueError("row 5 has no answer")
    _asks_outside(ranks)


def killed(ranks: Pool, number: int, work, *arguments) -> tuple[str, float]:
    """The first rank's error, and how long after the signal all had ended."""
    ranks.begin(work, *arguments)
    time.sleep(0.3)
    ranks.kill(number)
    began = time.monotonic()
    kind, said = ranks.outcome(0)
    assert kind == "raises", said
    for process in ranks.processes:
        process.join(SOON_S)
        assert process.exitcode is not None, "it still waits"
    return said, time.monotonic() - began


@pytest.mark.parametrize(
    ("work", "arguments"),
    [
        pytest.param(_asks_outside, (), id="it asks outside"),
        pytest.param(_computes, (), id="what it computes alone", marks=pytest.mark.slow),
        pytest.param(_adds, (2, 60.0), id="a collective"),
        pytest.param(_gathers, (1, 60.0), id="it listens to a rank"),
        pytest.param(_meets, (2, 60.0), id="they form their process group"),
    ],
)
def test_a_rank_that_is_killed_ends_all_and_the_first_names_it_whatever_it_waits_for(work, arguments):
    with pool(3) as ranks:
        victim = arguments[0] if arguments else 2
        said, seconds = killed(ranks, victim, work, *arguments)
    assert said == f"RunError: {KILLED.format(victim)}"
    assert seconds < SOON_S


def test_what_is_not_to_be_broken_off_is_done_before_another_rank_s_end_ends_the_first():
    with pool(2) as ranks:
        ranks.begin(_computes_unbroken)
        time.sleep(0.3)
        ranks.kill(1)
        assert ranks.outcome(0) == ("gives", [True, KILLED.format(1)])


def _cleans_up(ranks: Ranks) -> list[object]:
    cleaned = False
    try:
        with ranks.explained():
            try:
                raise RunError("the disk is full")
            finally:
                if ranks.first:
                    time.sleep(1.5)  # the other rank has long given up
                cleaned = True
    except RunError as error:
        if not ranks.first:
            raise
        return [cleaned, str(error)]
    return []


def test_a_first_rank_that_ends_already_is_not_interrupted_in_it_by_the_others_which_end_too():
    with pool(2) as ranks:
        ranks.begin(_cleans_up)
        assert ranks.outcome(0) == ("gives", [True, "the disk is full"])


def test_the_first_rank_s_end_ends_all_others_whatever_they_wait_for():
    with pool(3) as ranks:
        ranks.begin(_adds, 1, 60.0)  # rank 1 sleeps, rank 2 is in a collective
        time.sleep(0.3)
        ranks.kill(0)
        for process in ranks.processes[1:]:
            process.join(SOON_S)
            assert process.exitcode == 1


@pytest.mark.parametrize("work", [_fails, _fails_while_the_first_asks])
def test_an_error_of_another_rank_is_what_the_first_says_in_one_line(work):
    with pool(3) as ranks:
        outcomes = ranks.outcomes(work, 1)
    said = {
        _fails: "rank 1 of the trainer: ZeroDivisionError: a device-side assert",
        _fails_while_the_first_asks: "rank 1 of the trainer: row 5 has no answer",
    }[work]
    assert outcomes[0] == ("raises", f"RunError: {said}")


def _fails_outside(ranks: Ranks) -> None:
    ranks.heard(_explodes)


def _explodes() -> None:
    raise RunError("the reward server is gone")


def test_an_error_that_the_first_rank_meets_outside_is_its_own_and_ends_all():
    with pool(3) as ranks:
        ranks.begin(_fails_outside)
        assert ranks.outcome(0) == ("raises", "RunError: the reward server is gone")
        for process in ranks.processes:
            process.join(SOON_S)
            assert process.exitcode is not None


@pytest.mark.parametrize(
    "work",
    [pytest.param(_adds, id="a collective", marks=pytest.mark.slow), pytest.param(_gathers, id="a message")],
)
def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_timeout_s_which_is_named(work):
    with pool(2, timeout_s=1.0) as ranks:
        kind, said = ranks.outcomes(work, 1, 30.0)[0]
    assert kind == "raises" and "for 1 s (trainer.timeout_s)" in said and "\n" not in said


def _interrupted(ranks: Ranks) -> str:
    def call() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    try:
        ranks.heard(call)
    except KeyboardInterrupt as error:
        return type(error).__name__
    return "went on"


@pytest.mark.usefixtures("default_signals")
def test_ctrl_c_while_the_first_asks_outside_is_ctrl_c_and_no_rank_s_death():
    with pool(2) as ranks:
        ranks.begin(_interrupted)
        assert ranks.outcome(0) == ("gives", "KeyboardInterrupt")
