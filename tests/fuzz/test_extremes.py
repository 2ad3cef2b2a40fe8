"""Small messages that ask for a lot are refused in one line, after little memory and few steps."""

import random
import tracemalloc

import extremes
import pytest
import torch
from sizes import sized

from transfer.agreement import wire
from transfer.agreement.manifest import Manifest
from transfer.engine import handle_check, inert_pickle
from transfer.engine.handles import Importer
from transfer.engine.ipc import IPCWeightTransferEngine

MIB = 2**20


def handle(dtype="float32", shape=(4,), size=16):
    return {handle_check.host_id(): ["memfd", 1, 3, 3, 0, size, dtype, list(shape)]}


def refused(call):
    """The reason, and the most memory that it took."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            call()
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def pickled(instructions):
    return b"\x80\x02" + instructions + b"."


@pytest.mark.parametrize("width, levels", [(60, 5), (100, 6), (250, 8)])
def test_values_in_values_in_values_are_counted_as_often_as_they_occur(width, levels):
    data = pickled(extremes.laughs(width, levels))
    assert len(data) < 12_000
    reason, peak = refused(lambda: inert_pickle.loads(data))
    assert "more than 16777216 values and characters, each counted as often as it occurs" in reason
    assert peak < MIB


def test_a_value_that_is_large_only_by_its_repeats_is_refused_without_being_walked():
    value = inert_pickle.loads(pickled(extremes.laughs(60, 3)))  # 216,000 numbers in 60 + 60 + 60 places
    field = handle(dtype=value)
    reason, peak = refused(lambda: handle_check.check("float32", [4], field))
    assert reason == "the message says float32, the handle " + str(value)[:77] + "..."
    assert peak < 100_000


@pytest.mark.parametrize("index", range(8))
def test_no_field_of_a_handle_is_printed_whole(index):
    value: list = [1]
    for _ in range(12):
        value = [value] * 100
    made = handle()
    [fields] = made.values()
    fields[index] = value
    reason, peak = refused(lambda: handle_check.check("float32", [4], made))
    assert len(reason) < 200 and "\n" not in reason and peak < 100_000


def test_long_strings_in_many_places_count_with_their_characters():
    text = b"X" + MIB.to_bytes(4, "little") + b"a" * MIB + b"q\0"
    reason, peak = refused(lambda: inert_pickle.loads(pickled(b"(" + text + b"h\0" * 20 + b"t")))
    assert "each counted as often as it occurs" in reason and peak < 8 * MIB


def test_the_calls_of_a_pickle_make_no_more_bytes_than_it_has():
    data = pickled(extremes.encoded(100_000))
    assert len(data) < 1.2 * MIB
    reason, peak = refused(lambda: inert_pickle.loads(data))
    assert "more bytes are encoded than it has" in reason
    assert peak < 3 * len(data)


def test_honest_bytes_of_protocol_2_may_be_many():
    import pickle

    values = [bytes(range(256)) + index.to_bytes(4, "little") for index in range(2000)]
    assert inert_pickle.loads(pickle.dumps(values, 2)) == values


PIECES = {
    "memory of nothing": b"N\x94",
    "empty dicts": b"}",
    "lists of one": b"]Na",
    "dicts of one": b"}\x8c\x00Ns",
    "short strings": b"\x8c\x04\xf0\x9f\x98\x80",
    "names": b"ctorch\nSize\n",
}


@pytest.mark.parametrize("name", sized(PIECES, less=("lists of one", "dicts of one", "names")))
def test_a_pickle_of_eight_mebibytes_takes_twelve_times_as_much_at_most(name):
    piece = PIECES[name]
    data = (b"\x80\x04" + piece * min(2**20, inert_pickle.MAX_BYTES // len(piece)))[: inert_pickle.MAX_BYTES]
    _, peak = refused(lambda: inert_pickle.loads(data))
    assert peak < 12 * inert_pickle.MAX_BYTES


SHAPES = [[2**47, 2**47, 0], [0, 2**47, 2**47], [2**47] * 63 + [0], [2**47] * 64, [2**24, 2**24, 2]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shape_whose_strides_would_overflow_is_refused_also_of_an_empty_tensor(shape):
    reason, _ = refused(lambda: handle_check.check("float32", shape, handle(shape=shape, size=0)))
    assert "has sizes of more than 281474976710656 bytes together" in reason and len(reason) < 200
    with pytest.raises(ValueError, match="entry 0 of a manifest must be"):
        Manifest.from_json({"entries": [["w", "float32", shape, []]]})


def test_the_largest_empty_tensor_that_is_let_in_can_be_made():
    shape = [2**45, 0, 2]
    checked = handle_check.check("float32", shape, handle(shape=shape, size=0))
    assert list(Importer().open(checked).shape) == shape
    assert Manifest.from_json({"entries": [["w", "float32", shape, []]]}).nbytes == 0


def test_a_manifest_with_a_shape_of_half_a_million_sizes_is_refused_before_they_are_multiplied():
    with pytest.raises(ValueError, match="entry 0 of a manifest must be"):
        Manifest.from_json({"entries": [["w", "float32", [2**48] * 500_000, []]]})


def test_a_message_of_many_empty_lists_is_refused_before_it_is_parsed():
    body = b'{"prompt": [' + b"[]," * (2**20) + b"[]]}"
    tracemalloc.start()
    try:
        with pytest.raises(wire.Refused, match="more than 1048576 lists and objects"):
            wire.loads(body, 64 * MIB)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(body)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("number", range(20))
def test_every_extreme_of_the_fuzz_is_refused_in_one_short_line(number):
    names = ["a", "b"]
    info = {"names": names, "dtype_names": ["float32"] * 2, "shapes": [[4]] * 2}
    engine = IPCWeightTransferEngine(None, None)
    asked = extremes.extreme(random.Random(number), info, [handle(), handle()])
    loaded: list[torch.Tensor] = []
    reason, peak = refused(lambda: engine.receive_weights(engine.parse_update_info(asked), loaded.append))
    assert not loaded and "\n" not in reason and len(reason) < 300 and peak < 24 * MIB
