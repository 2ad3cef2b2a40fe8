"""What ranks tell each other arrives as it was, to the bit; what cannot be told is refused."""

from __future__ import annotations

import math
from array import array

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from rlhf.ranks.frames import packed, unpacked
from rlhf.ranks.outside import heard, told
from rlhf.types import Completion, Prompt, Rollouts, Told

SPANS = {"i": 31, "b": 7, "Q": 64}  # type codes that rollouts have, with the bits of a number


def columns(code: str) -> st.SearchStrategy[array]:
    if code in "fd":
        numbers = st.floats(width=32 if code == "f" else 64)
    else:
        numbers = st.integers(0 if code == "Q" else -(2 ** SPANS[code]), 2 ** SPANS[code] - 1)
    return st.builds(array, st.just(code), st.lists(numbers, max_size=5))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS | st.sampled_from("fdibQ").flatmap(columns),
    lambda held: st.lists(held, max_size=4) | st.dictionaries(st.text(alphabet="ab\u00e9\n"), held, max_size=4),
    max_leaves=8,
)


def same(one: object, other: object) -> bool:
    """Equal to the bit, of the same types, NaN included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, array):
        return one.typecode == other.typecode and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return (
            math.isnan(one) if math.isnan(other) else (one, math.copysign(1, one)) == (other, math.copysign(1, other))
        )
    return one == other


@settings(max_examples=60)
@given(VALUES)
def test_whatever_is_json_or_a_column_arrives_as_it_was(value):
    assert same(unpacked(packed(value)), value)


@pytest.mark.parametrize(
    "value", [object(), {"a": {1, 2}}, [b"bytes"], {"row": range(3)}, 1j], ids=lambda v: type(v).__name__
)
def test_what_is_neither_json_nor_a_column_is_refused_with_its_type(value):
    with pytest.raises(TypeError, match="is neither JSON nor a column"):
        packed(value)


@settings(max_examples=25)
@given(st.data())
def test_samples_arrive_as_they_were_but_for_what_prompts_hold_beside_their_ids(data):
    row = st.builds(
        Completion,
        *(columns(code) for code in "ifQ"),
        st.sampled_from(["stop", "length"]),
        st.none() | columns("b"),
    )
    completions = data.draw(st.lists(row, min_size=2, max_size=4))
    n = len(completions)
    prompts = [Prompt("what?", (5, 6), {"answer": "that"}), Prompt("why?", (), {}, ({"role": "user"},))]
    texts = data.draw(st.lists(st.text(), min_size=n, max_size=n))
    talks = data.draw(st.just([]) | st.just([Told(["a", "b", "c"], 0.5, "", {"calls": 2.0})] * n))
    rollouts = Rollouts(prompts, completions, texts, [7, 2**63], n // 2, talks)
    came = heard(unpacked(packed(told(rollouts))))
    assert [prompt.ids for prompt in came.prompts] == [(5, 6), ()]
    assert (came.texts, came.seeds, came.samples_per_prompt, came.episodes) == (texts, [7, 2**63], n // 2, talks)
    for one, other in zip(completions, came.completions, strict=True):
        assert all(same(getattr(one, name), getattr(other, name)) for name in Completion.__slots__)
