"""Which rows are computed together: all of them once, within the budget, with little padding."""

import random
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from rlhf.learning.microbatches import Sizes, balanced, fill, length_groups, split


@st.composite
def batches(draw) -> Sizes:
    prompts = draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
    of_rows = [p for p in range(len(prompts)) for _ in range(draw(st.integers(1, 6)))]
    return Sizes(prompts, of_rows, draw(st.lists(st.integers(0, 40), min_size=len(of_rows), max_size=len(of_rows))))


def in_order(sizes: Sizes, rows: list[int], budget: int) -> list[list[int]]:
    """The split without sorting, written the slow way."""
    parts: list[list[int]] = []
    for row in rows:
        if parts and sizes.tokens([*parts[-1], row]) <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def tokens(sizes: Sizes, parts: list[list[int]]) -> int:
    return sum(map(sizes.tokens, parts))


@given(batches(), st.integers(1, 400), st.randoms())
def test_every_row_is_in_one_micro_batch_none_exceeds_the_budget_and_none_pads_more_than_unsorted_rows(
    sizes, budget, chance
):
    rows = chance.sample(range(len(sizes.prompt_of_B)), chance.randint(1, len(sizes.prompt_of_B)))
    parts = split(sizes, rows, budget)
    assert sorted(row for part in parts for row in part) == sorted(rows)
    assert all(sizes.tokens(part) <= budget or len(part) == 1 for part in parts)
    assert tokens(sizes, parts) <= tokens(sizes, in_order(sizes, rows, budget))


@given(batches(), st.integers(1, 400), st.integers(1, 5), st.booleans())
def test_ranks_get_as_many_micro_batches_each_where_that_can_be_and_none_exceeds_the_budget(
    sizes, budget, ranks, packed
):
    rows = range(len(sizes.prompt_of_B))
    cut = partial(fill, sizes, rows, shared=True) if packed else partial(split, sizes, rows)
    plain, parts = cut(budget), balanced(cut, budget, ranks)
    assert sorted(row for part in parts for row in part) == list(rows)
    assert len(plain) <= len(parts) <= -(-len(plain) // ranks) * ranks
    assert max(map(sizes.tokens, parts)) <= max(map(sizes.tokens, plain)) or packed
    if len(plain) % ranks == 0:
        assert parts == plain


def test_one_micro_batch_of_many_equal_rows_becomes_one_for_each_rank():
    sizes = Sizes([10] * 8, [row // 8 for row in range(64)], [20] * 64)
    for ranks in (2, 3, 4):
        parts = balanced(partial(fill, sizes, range(64), shared=True), 10_000, ranks)
        assert len(parts) == ranks and max(map(len, parts)) <= 64 / ranks + 8


def test_tokens_of_a_micro_batch_are_those_of_its_two_tensors():
    sizes = Sizes(prompts=[3, 7, 2], prompt_of_B=[0, 0, 1, 2], responses_B=[4, 0, 9, 0])
    assert sizes.tokens([0, 1]) == 1 * 3 + 2 * 4
    assert sizes.tokens([0, 2]) == 2 * 7 + 2 * 9
    assert sizes.tokens([1, 3]) == 2 * 3 + 2 * 1, "a row without tokens is one wide"


def test_rows_that_fit_are_one_micro_batch_in_their_own_order():
    sizes = Sizes([5, 5], [0, 0, 1, 1], [9, 1, 7, 2])
    assert split(sizes, [3, 0, 2, 1], 46) == [[3, 0, 2, 1]]
    assert len(split(sizes, [3, 0, 2, 1], 45)) > 1


def heavy_tail(prompt: int) -> Sizes:
    """32 prompts x 8 rows; most responses are short, a few are long."""
    chance = random.Random(0)
    lengths = [min(512, int(chance.lognormvariate(4.0, 1.0)) + 1) for _ in range(256)]
    return Sizes([prompt] * 32, [b // 8 for b in range(256)], lengths)


def test_sorted_rows_leave_out_most_of_the_padding():
    sizes = heavy_tail(prompt=16)
    real = sum(sizes.responses_B) + sum(sizes.prompts)
    unsorted, ours = in_order(sizes, list(range(256)), 4096), split(sizes, range(256), 4096)
    assert tokens(sizes, unsorted) - real > 5 * (tokens(sizes, ours) - real)
    assert len(ours) < len(unsorted)


def test_prompts_that_cost_more_than_padding_stay_whole():
    sizes = heavy_tail(prompt=2000)
    parts = split(sizes, range(256), 16384)
    computed = sum(len({sizes.prompt_of_B[row] for row in part}) for part in parts)
    assert computed <= 32 + len(parts), "a prompt is computed twice only where a micro-batch ends within its rows"
    assert tokens(sizes, parts) < tokens(sizes, in_order(sizes, list(range(256)), 16384))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=200))
def test_length_groups_hold_every_row_of_two_tokens_or_more_once(lengths):
    groups = length_groups(lengths)
    held = [row for rows, _ in groups for row in rows]
    assert len(held) == len(set(held)) and set(held) >= {row for row, length in enumerate(lengths) if length > 1}
    assert all(width == max(lengths[row] for row in rows) for rows, width in groups)
    assert len(groups) <= 2


def test_short_rows_are_computed_apart_from_long_ones():
    lengths = [2, 9, 2, 2, 3, 9] * 40
    (short, width), (rest, longest) = length_groups(lengths)
    assert (width, longest) == (3, 9) and len(short) % 32 == 0 and len(short) + len(rest) == 240
