"""What is printed of a value or a text from outside: little work, one line, nothing that a terminal would obey."""

import tracemalloc

import pytest

from transfer.agreement.shown import COLOUR, one_line, printable, shown


class Counted(list):
    """A list that counts how many of its items are looked at."""

    seen = 0

    def __iter__(self):
        for item in super().__iter__():
            Counted.seen += 1
            yield item


def laughs(levels, width=100):
    """Lists inside each other, each of which holds the next `width` times."""
    value = Counted([1])
    for _ in range(levels):
        value = Counted([value] * width)
    return value


def peak_of(call):
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -0.5, "a'b", "\x1b", b"\x1b[", [], (), {}, (1,), (1, 2), [1, {"k": (None,)}], {"a": 1, "b": [2]}],
)
def test_small_values_are_shown_as_repr_has_them(value):
    assert shown(value) == repr(value)


def test_a_value_of_ten_to_the_24th_items_is_shown_after_looking_at_a_hundred_of_them():
    Counted.seen = 0
    text, peak = peak_of(lambda: shown(laughs(12)))
    assert text.startswith("[[[[[[[[[[[[[1], [1], [1], ") and text.endswith("...") and len(text) == 80
    assert Counted.seen < 100 and peak < 100_000


@pytest.mark.parametrize(
    "value",
    ["a" * 10**7, b"\0" * 10**7, ["a" * 10**6] * 5, {"k" * 10**6: 1}, {(("a" * 10**6,) * 50,) * 50: 1}, [0] * 10**6],
)
def test_long_values_are_cut_before_they_are_printed(value):
    text, peak = peak_of(lambda: shown(value))
    assert len(text) == 80 and text.endswith("...") and peak < 100_000


def test_a_list_inside_itself_or_inside_a_thousand_others_is_shown():
    loop: list = []
    loop.append(loop)
    deep: list = []
    for _ in range(10**4):
        deep = [deep]
    assert shown(loop) == shown(deep) == "[" * 16 + "..." + "]" * 16


def test_an_integer_that_python_would_not_print_is_told_by_its_size():
    assert shown(2**100_000) == "<an integer of 100001 bits>"
    assert shown([10**30]) == f"[{10**30}]"


HOSTILE = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\r", "\b", "\0", "\u202e", "\u2028", "\ud800", "\x1bP", "\x7f"]


@pytest.mark.parametrize("sequence", HOSTILE)
def test_no_character_that_a_terminal_would_obey_is_left_and_every_text_can_be_encoded(sequence):
    for made in (printable(f"a{sequence}b"), one_line(f"a{sequence}b"), shown(f"a{sequence}b")):
        assert made.isprintable() and made.encode() and made.strip("'")[0] == "a" and made.strip("'")[-1] == "b"


def test_honest_text_stays_as_it_is_but_for_its_colours():
    text = "größer: 漢字 → ok\n\tindented"
    assert printable(f"\x1b[1;31m{text}\x1b[0m") == text
    assert one_line(f"\x1b[1;31m{text}\x1b[0m") == "größer: 漢字 → ok indented"
    assert not COLOUR.search(text)


def test_a_text_of_any_length_becomes_one_line_of_two_thousand_characters():
    text = "line\n" * 10**6
    line, peak = peak_of(lambda: one_line(text))
    assert len(line) == 2000 and line.startswith("line line") and line.endswith("...") and peak < 500_000
