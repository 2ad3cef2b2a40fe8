"""A slow environment holds its own row, and no other."""

import math
import random
import time

import pytest
from test_failures import play, tokenizer  # noqa: F401

ROWS, TURNS = 256, 4


def delays(seed, low=0.005, high=2.0):
    """Of each row's turns, log-uniform between these seconds."""
    draw = random.Random(seed)
    return [[math.exp(draw.uniform(math.log(low), math.log(high))) for _ in range(TURNS)] for _ in range(ROWS)]


@pytest.mark.slow
def test_many_rows_take_as_long_as_the_longest_of_them_and_not_as_long_as_the_longest_of_each_turn(tokenizer):  # noqa: F811
    drawn, sampling = delays(0), 0.01
    longest, barrier = max(map(sum, drawn)), sum(max(turn) for turn in zip(*drawn, strict=True))
    rows = [{"delays": each} for each in drawn]
    play(tokenizer, rows[:1], name="Sleeper")  # a process starts
    began = time.monotonic()
    rollouts = play(tokenizer, rows, name="Sleeper", turns=TURNS, seconds=sampling)
    took = time.monotonic() - began
    print(f"\n{took:.2f} s; the longest row {longest:.2f} s, by turns {barrier:.2f} s")
    assert [told.score for told in rollouts.episodes] == [float(TURNS)] * ROWS
    assert took < barrier, "no turn waits for the slowest row of the one before"


def test_rows_are_the_same_one_at_a_time_or_all_at_once(tokenizer):  # noqa: F811
    rows = [{"delays": [0.001 * (k % 3)] * 2} for k in range(8)]
    together = play(tokenizer, rows, n=2, name="Sleeper", turns=2)
    alone = play(tokenizer, rows, n=2, name="Sleeper", turns=2, concurrency=1)
    assert [row.ids for row in together.completions] == [row.ids for row in alone.completions]
    assert together.episodes == alone.episodes and together.seeds == alone.seeds
