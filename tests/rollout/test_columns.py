"""Samples as bytes: what goes in comes out, and whatever else comes is refused."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.rollout.columns import HEAD, REASONS, Expected, decode, encode
from rlhf.rollout.sampling import Sample
from transfer.agreement.wire import COLUMNS_TYPE

FLOATS = st.floats(-100, 0, width=32)
RUNS = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 4)), max_size=4)
VOCABULARY, LONGEST = 2**31 - 1, 16


@st.composite
def a_sample(draw):
    versions = [version for version, tokens in draw(RUNS) for _ in range(tokens)]
    ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=len(versions), max_size=len(versions)))
    logprobs = draw(st.none() | st.lists(FLOATS, min_size=len(versions), max_size=len(versions)))
    return Sample(ids, logprobs, versions, draw(st.sampled_from(REASONS)))


SAMPLES = st.lists(a_sample(), max_size=5)


def expected(samples, **changes):
    return Expected(**{"rows": len(samples), "max_tokens": LONGEST, "vocabulary": VOCABULARY} | changes)


@given(SAMPLES)
def test_samples_come_back_as_they_were(samples):
    assert decode(encode(samples), expected(samples)) == samples


def test_the_form_is_the_documented_one_byte_by_byte():
    samples = [Sample([5, 1], [-0.5, -0.25], [7, 8], "stop"), Sample([6], None, [8], "length")]
    header = b'{"rows": 2, "tokens": 3, "logprobs": 2, "runs": 3}'
    ints = lambda size, *values: b"".join(value.to_bytes(size, "little") for value in values)  # noqa: E731
    raw = encode(samples)
    assert raw == b"".join(
        [
            b"rlhfcols" + ints(4, 1, len(header)) + header,
            ints(4, 2, 1) + bytes([0, 1]) + ints(4, 5, 1, 6),
            bytes([1, 0]) + bytes.fromhex("000000bf000080be"),
            ints(4, 2, 1) + ints(8, 7, 8, 8) + ints(4, 1, 1, 1),
        ]
    )
    assert raw.content_type == COLUMNS_TYPE
    again = copy.copy(raw)  # by the way of a pickle, as through Ray
    assert (again, again.content_type) == (raw, COLUMNS_TYPE)


CORRUPTIONS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "add", "end"]), st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def corrupted(raw, changes):
    raw = bytearray(raw)
    for kind, where, byte in changes:
        place = int(where * len(raw))
        match kind:
            case "flip" if raw:
                raw[place] = byte
            case "cut":
                del raw[place : place + 1 + byte % 8]
            case "add":
                raw[place:place] = bytes([byte] * (1 + byte % 8))
            case "end":
                del raw[place:]
    return bytes(raw)


@given(SAMPLES, CORRUPTIONS)
def test_corrupted_bytes_are_refused_or_are_another_valid_answer(samples, changes):
    try:
        found = decode(corrupted(encode(samples), changes), expected(samples))
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    check(found, samples)


def check(found, samples):
    assert len(found) == len(samples)
    for sample in found:
        assert len(sample.ids) == len(sample.versions) <= LONGEST and sample.finish_reason in REASONS
        assert sample.logprobs is None or len(sample.logprobs) == len(sample.ids)
        assert decode(encode([sample]), expected([sample])) == [sample]


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(raw):
    with pytest.raises(ValueError):
        decode(raw, Expected(1, 4))


SAMPLE = Sample([5, 1], [-0.5, -0.25], [7, 8], "stop")
HEADER = len(json.dumps({"rows": 1, "tokens": 2, "logprobs": 2, "runs": 2}))
BEGIN = HEAD.size + HEADER  # lengths 4, reasons 1, ids 8, measured 1, logprobs 8, runs_of 4, versions 16, run_tokens 8


def patched(offset, content, base=BEGIN):
    raw = bytearray(encode([SAMPLE]))
    raw[base + offset : base + offset + len(content)] = content
    return bytes(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes are no columns"),
        (patched(0, b"RLHF", 0), "begin with"),
        (patched(8, b"\2", 0), "version 2"),
        (patched(12, b"\xff\xff\xff\xff", 0), "header of 4294967295 bytes"),
        (patched(0, b"[", HEAD.size), "not JSON"),
        (patched(2, b"cows", HEAD.size), "must have rows"),
        (patched(9, b"2", HEAD.size), "2 rows"),
        (patched(22, b"9", HEAD.size), "9 tokens"),
        (encode([SAMPLE]) + b"\0", "bytes where the header speaks of"),
        (encode([SAMPLE])[:-1], "bytes where the header speaks of"),
        (patched(0, b"\xff\xff\xff\xff"), "length is not from 0 to 4"),
        (patched(0, b"\3"), "do not add up to the tokens"),
        (patched(4, b"\3"), "finish reason"),
        (patched(5, b"\xff\xff\xff\xff"), "token id"),
        (patched(5, b"\x0c"), "token id"),
        (patched(13, b"\2"), "0 or 1"),
        (patched(13, b"\0"), "log-probs"),
        (patched(14, b"\0\0\xc0\x7f"), "not finite"),
        (patched(14, b"\0\0\x80\x7f"), "not finite"),
        (patched(14, b"\0\0\xa0\x40"), "a log-prob is 5, and none is above 0"),
        (patched(42, b"\0\xa3\xe1\x11"), "runs of a row"),  # 3e8 tokens of one version
        (patched(22, b"\3"), "runs do not add up"),
        (patched(42, b"\0"), "no tokens"),
        (patched(42, b"\2"), "runs of a row"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(raw, message):
    with pytest.raises(ValueError, match=message):
        decode(raw, Expected(1, 4, 12))


def test_a_log_prob_that_is_above_0_by_rounding_is_taken():
    samples = [Sample([5, 1], [1e-6, -0.25], [7, 8], "stop")]
    assert decode(encode(samples), Expected(1, 4, 12)) == samples


def test_a_header_that_speaks_of_more_than_was_asked_for_is_refused_before_anything_is_read():
    counts = {"rows": 2**31 - 1, "tokens": 2**31 - 1, "logprobs": 0, "runs": 0}
    header = json.dumps(counts).encode()
    with pytest.raises(ValueError, match="were asked for"):
        decode(HEAD.pack(b"rlhfcols", 1, len(header)) + header, Expected(1, 4))
