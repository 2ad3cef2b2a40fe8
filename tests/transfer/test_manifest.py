import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transfer.agreement.manifest import ALIGNMENT, DTYPES, Manifest


def test_every_offset_is_aligned_also_behind_odd_sizes():
    manifest = Manifest.of({"a": torch.zeros(3, dtype=torch.int8), "b": torch.zeros(2), "c": torch.zeros(())})
    assert [(e.offset, e.nbytes) for e in manifest.entries] == [(0, 3), (256, 8), (512, 4)]
    assert manifest.nbytes == 516


def test_tied_weights_are_one_entry_with_aliases():
    tied = torch.zeros(2, 3)
    manifest = Manifest.of({"head": tied, "embed": tied.view(2, 3), "other": torch.zeros(2, 3)})
    assert [(e.name, e.aliases) for e in manifest.entries] == [("embed", ("head",)), ("other", ())]
    assert manifest.by_name["head"].name == "embed"


def test_views_that_differ_in_shape_or_place_or_layout_are_not_aliases():
    base = torch.zeros(4, 4)
    manifest = Manifest.of({"a": base, "b": base.t(), "c": base[:2], "d": base[2:], "e": base.view(16)})
    assert len(manifest.entries) == 5


def test_empty_tensors_are_never_aliases_of_each_other():
    assert len(Manifest.of({"a": torch.empty(0), "b": torch.empty(0)}).entries) == 2


def test_only_floating_point_is_cast():
    weights = {"w": torch.zeros(2), "n": torch.zeros(2, dtype=torch.int64), "m": torch.zeros(2, dtype=torch.bool)}
    manifest = Manifest.of(weights, torch.bfloat16)
    assert {e.name: e.dtype for e in manifest.entries} == {"w": "bfloat16", "n": "int64", "m": "bool"}
    assert manifest.floating_dtype() == "bfloat16"


def test_the_order_of_the_modules_does_not_matter():
    weights = {"b": torch.zeros(2), "a": torch.zeros(3)}
    assert Manifest.of(weights).digest == Manifest.of(dict(reversed(weights.items()))).digest


def test_a_dtype_that_cannot_travel_is_named():
    with pytest.raises(ValueError, match=r"w has dtype uint32.*allowed: .*bfloat16"):
        Manifest.of({"w": torch.zeros(2, dtype=torch.uint32)})
    with pytest.raises(ValueError, match="w must be a plain tensor"):
        Manifest.of({"w": torch.zeros(2).to_sparse()})
    with pytest.raises(ValueError, match="w must be a plain tensor"):
        Manifest.of({"w": torch.zeros(2, device="meta")})


tensors = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=DTYPES[dtype]),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(sorted(DTYPES)),
)
plans = st.dictionaries(st.text(min_size=1, max_size=6), tensors, max_size=6).map(Manifest.of)


@given(plans)
def test_json_there_and_back_is_the_same_plan(manifest):
    again = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest and again.digest == manifest.digest
    assert manifest.differences(again) == []


@given(plans, plans)
def test_two_plans_differ_exactly_if_their_digests_do(one, two):
    assert (one.differences(two) == []) == (one.digest == two.digest)


@given(plans)
def test_no_two_entries_overlap(manifest):
    end = 0
    for entry in manifest.entries:
        assert entry.offset >= end and entry.offset % ALIGNMENT == 0
        end = entry.offset + entry.nbytes
    assert end == manifest.nbytes


def test_every_kind_of_difference_is_listed():
    tied, loose = torch.zeros(2), torch.zeros(2)
    ours = Manifest.of({"a": torch.zeros(1), "b": torch.zeros(2), "c": torch.zeros(3), "t": tied, "u": tied})
    other = {"b": torch.zeros(3), "c": torch.zeros(3, dtype=torch.int8), "t": tied, "u": loose, "x": loose[:1]}
    assert ours.differences(Manifest.of(other)) == [
        "missing: a",
        "shape: b is [3], not [2]",
        "dtype: c is int8, not float32",
        "alias: t is tied as ['t'], not ['t', 'u']",
        "alias: u is tied as ['u'], not ['t', 'u']",
        "unexpected: x",
    ]


def test_only_the_first_ten_differences_are_listed():
    lines = Manifest.of({f"w{i:02}": torch.zeros(1) for i in range(15)}).differences(Manifest.of({}))
    assert len(lines) == 11 and lines[9] == "missing: w09" and lines[10] == "and 5 more"


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"entries": [], "more": 1},
        {"entries": {}},
        {"entries": [["a", "float32", [1]]]},
        {"entries": [["a", "object", [1], []]]},
        {"entries": [["a", "float32", [-1], []]]},
        {"entries": [["a", "float32", [True], []]]},
        {"entries": [["a", "float32", [1.0], []]]},
        {"entries": [["a", "float32", [2**40, 2**40], []]]},
        {"entries": [["a", "float32", [1], [3]]]},
        {"entries": [[1, "float32", [1], []]]},
        {"entries": [["a", "float32", [1], []], ["a", "float32", [1], []]]},
        {"entries": [["a", "float32", [1], ["a"]]]},
        {"entries": [["b", "float32", [1], []], ["a", "float32", [1], []]]},
    ],
)
def test_json_that_is_no_manifest_is_refused(value):
    with pytest.raises(ValueError, match="manifest"):
        Manifest.from_json(value)
