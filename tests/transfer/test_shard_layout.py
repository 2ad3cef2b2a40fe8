"""Which rows of a tensor lie with which rank, and how a worker finds them."""

import json
from bisect import bisect_right
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from transfer.agreement.manifest import ALIGNMENT, Manifest
from transfer.agreement.shards import local, rows_of
from transfer.agreement.wire import Refused
from transfer.backends.make import make_intake
from transfer.backends.slots import SlotsOfRanks, begin_of
from transfer.memory.digest import digest_of
from transfer.memory.regions import slot_bytes, tensors
from transfer.memory.rows import Rows, copy_rows, parts_of, places_of, whole_of
from transfer.memory.sums import added, sums_of
from transfer.vllm.described import Described

SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=5)


@given(SHAPES, st.integers(1, 12), st.sets(st.integers(0, 4)), st.sampled_from([torch.float32, torch.int8]))
def test_the_ranks_hold_every_row_of_every_tensor_once_and_torch_chunk_says_which(shapes, ranks, whole, dtype):
    weights = {f"w{i}": torch.zeros(shape, dtype=dtype) for i, shape in enumerate(shapes)}
    manifest = Manifest.of(weights)
    unsharded = {f"w{i}" for i in whole}
    held = [local(manifest, ranks, rank, unsharded).by_name for rank in range(ranks)]
    for name, tensor in weights.items():
        entries = [of_rank[name] for of_rank in held]
        if not tensor.ndim or name in unsharded:
            assert entries[0].shape == tensor.shape and all(entry.nbytes == 0 for entry in entries[1:])
            continue
        chunks = [len(chunk) for chunk in tensor.chunk(ranks)]
        assert [entry.shape[0] for entry in entries] == chunks + [0] * (ranks - len(chunks))
        assert all(entry.shape[1:] == tensor.shape[1:] for entry in entries)
        spans = [rows_of(len(tensor), ranks, rank) for rank in range(ranks)]
        assert [row for first, end in spans for row in range(first, end)] == list(range(len(tensor)))


@given(SHAPES, st.integers(1, 12))
def test_in_a_ranks_slot_no_two_tensors_overlap_and_each_is_aligned(shapes, ranks):
    manifest = Manifest.of({f"w{i}": torch.zeros(shape) for i, shape in enumerate(shapes)})
    for rank in range(ranks):
        end = 0
        for entry in local(manifest, ranks, rank).entries:
            assert entry.offset >= end and entry.offset % ALIGNMENT == 0
            end = entry.offset + entry.nbytes


def rows_at(tensor, ends):
    """Copies of the rows between these borders, each at a place of its own."""
    parts = tuple(tensor[a:b].clone() for a, b in zip([0, *ends], [*ends, len(tensor)], strict=True))
    return Rows(parts, tuple(ALIGNMENT * 100 * index for index in range(len(parts))))


@given(st.integers(0, 20), st.integers(1, 5), st.lists(st.integers(0, 20), max_size=4))
def test_rows_in_several_places_arrive_as_the_tensor_they_are(rows, width, cuts):
    tensor = torch.arange(rows * width).view(rows, width)
    ends = sorted(min(cut, rows) for cut in cuts)
    placed = rows_at(tensor, ends)
    target = torch.full_like(tensor, -1)
    copy_rows([(target, placed)])
    assert torch.equal(target, tensor) and torch.equal(torch.cat(list(parts_of([placed]))), tensor)
    assert torch.equal(whole_of(placed, tensor.shape, tensor.dtype, tensor.device), tensor)


def in_slots_of_ranks(weights, ranks, whole=()):
    """These weights as several ranks hold them, each in a slot of its own; and all slots behind each other."""
    manifest = Manifest.of(weights)
    layouts = [local(manifest, ranks, rank, whole) for rank in range(ranks)]
    memory = [SimpleNamespace(bytes=torch.zeros(slot_bytes(layout), dtype=torch.uint8)) for layout in layouts]
    for rank, (region, layout) in enumerate(zip(memory, layouts, strict=True)):
        for name, view in tensors(region, layout, 0).items():
            tensor = weights[name]
            first, end = rows_of(len(tensor), ranks, rank) if tensor.ndim and name not in whole else (0, 1)
            if view.numel():
                view.copy_(tensor[first:end] if tensor.ndim and name not in whole else tensor)
    return SlotsOfRanks(memory, manifest, 1, whole).slots[0], torch.cat([region.bytes for region in memory])


@given(SHAPES, st.integers(1, 6), st.sets(st.integers(0, 4)), st.sampled_from([torch.float32, torch.int8]))
def test_sums_that_each_rank_takes_of_its_own_rows_add_up_to_the_digest_of_all_slots(shapes, ranks, whole, dtype):
    weights = {f"w{i}": torch.randint(-99, 99, shape).to(dtype) for i, shape in enumerate(shapes)}
    slot, memory = in_slots_of_ranks(weights, ranks, {f"w{i}" for i in whole} & weights.keys())
    expected = sums_of([memory])
    begins = [begin_of(Manifest.of(weights), ranks, rank, {f"w{i}" for i in whole}) for rank in range(ranks)]
    pieces = [(part, place) for rows in slot.values() for part, place in zip(rows.parts, rows.places, strict=True)]
    of_ranks = [[piece for piece in pieces if bisect_right(begins, piece[1]) - 1 == rank] for rank in range(ranks)]
    sums = [sums_of([part for part, _ in own], [place for _, place in own]) for own in of_ranks]
    assert added(sums) == expected
    assert digest_of(parts_of(slot.values()), expected, places_of(slot.values()) or []) == expected


@given(SHAPES, st.integers(1, 6), st.sets(st.integers(0, 4)))
def test_slots_of_ranks_are_copied_into_the_tensors_that_they_hold(shapes, ranks, whole):
    weights = {f"w{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    slot, _ = in_slots_of_ranks(weights, ranks, {f"w{i}" for i in whole} & weights.keys())
    targets = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    copy_rows((targets[name], slot[name]) for name in weights)
    assert all(torch.equal(targets[name], weights[name]) for name in weights)


@st.composite
def viewed(draw, tensor):
    """What loaders make of a tensor: parts along any of its dimensions, transposed or with other ones."""
    for _ in range(draw(st.integers(0, 3))):
        dims = [dim for dim in range(tensor.dim()) if tensor.shape[dim] > 1]
        kind = draw(st.sampled_from(["part", "step", "transposed", "folded"]))
        if not dims:
            break
        dim = draw(st.sampled_from(dims))
        size = tensor.shape[dim]
        if kind == "part":
            start = draw(st.integers(0, size - 1))
            tensor = tensor.narrow(dim, start, draw(st.integers(1, size - start)))
        elif kind == "step":
            tensor = tensor[(slice(None),) * dim + (slice(None, None, draw(st.integers(1, 3))),)]
        elif kind == "transposed":
            tensor = tensor.transpose(dim, draw(st.integers(0, tensor.dim() - 1)))
        elif size % 2 == 0:
            tensor = tensor.unflatten(dim, (2, size // 2))
    return tensor


@given(st.data(), SHAPES, st.integers(1, 6), st.sets(st.integers(0, 4)))
def test_whatever_part_of_a_tensor_a_loader_takes_is_found_in_the_slots_of_the_ranks(data, shapes, ranks, whole):
    weights = {f"w{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    slot, memory = in_slots_of_ranks(weights, ranks, {f"w{i}" for i in whole} & weights.keys())
    described = Described(Manifest.of(weights))
    name = data.draw(st.sampled_from(sorted(weights)))
    source = data.draw(viewed(described.tensors[name]))
    at = source.storage_offset() - described.tensors[name].storage_offset()
    expected = weights[name].contiguous().as_strided(source.shape, source.stride(), at).clone()
    target = torch.full_like(expected, torch.nan)
    words = memory.view(torch.float32)
    for copy in described.copies(target, source, slot):
        assert copy.target.isnan().all(), "written once"
        copy.target.copy_(copy.source)
        assert torch.equal(words.as_strided(copy.source.shape, copy.source.stride(), copy.place // 4), copy.source)
        owners = [part for rows in slot.values() for part in rows.parts if part.data_ptr() <= copy.source.data_ptr()]
        part = max(owners, key=torch.Tensor.data_ptr)
        reach = sum((size - 1) * step for size, step in zip(copy.source.shape, copy.source.stride(), strict=True))
        assert copy.source.data_ptr() + 4 * reach < part.data_ptr() + part.nbytes, "in the rows of one rank"
    assert torch.equal(target, expected)


def test_weights_that_are_described_take_no_memory():
    described = Described(Manifest.planned({"w": torch.empty(2**36, dtype=torch.uint8, device="meta")}))
    assert described.tensors["w"].nbytes == 2**36 and described.tensors["w"][-1] == 0


# --- a worker that is told nonsense -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where, said",
    [
        ({"slots": 2, "ranks": 3}, "where.ranks must be 2, the number of endpoint.sockets"),
        ({"slots": 2, "ranks": 2, "whole": ["w", "v"]}, "where.whole names tensors that are not in the manifest"),
        ({"slots": 2, "ranks": 0}, "where.ranks has a value that is not allowed"),
        ({"slots": 2, "ranks": 2, "whole": [1]}, "where.whole has a value that is not allowed"),
        ({"slots": 2, "ranks": 2, "regions": []}, "where.regions must be 2, one a rank"),
        ({"slots": 2, "ranks": 2, "regions": [{"device": "x"}] * 2}, "where.regions has a value that is not allowed"),
        ({"slots": 2, "ranks": 2, "regions": [{"device": "x", "handle": "y"}] * 2}, "must be 128 hexadecimal digits"),
    ],
    ids=json.dumps,
)
def test_a_worker_refuses_ranks_that_it_was_not_told_of(where, said):
    endpoint = {"backend": "ipc", "staging": "arena", "take": "copy", "socket": "a", "sockets": ["a", "b"]}
    manifest = Manifest.of({"w": torch.zeros(4)})
    with pytest.raises((ValueError, Refused), match=said):
        make_intake(endpoint).prepare(manifest, where, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"transfer\.take=copy"):
        make_intake({**endpoint, "take": "view"}).prepare(manifest, {"slots": 2, "ranks": 2}, torch.device("cpu"))
