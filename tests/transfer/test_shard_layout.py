"""Which rows of a tensor lie with which rank, and how a worker finds them."""

import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from transfer.agreement.manifest import ALIGNMENT, Manifest
from transfer.agreement.shards import local, rows_of
from transfer.agreement.wire import Refused
from transfer.backends.make import make_intake
from transfer.memory.rows import Rows, copy_rows, in_one_place, parts_of

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


@given(st.integers(0, 20), st.integers(1, 5), st.lists(st.integers(0, 20), max_size=4))
def test_rows_in_several_places_arrive_as_the_tensor_they_are(rows, width, cuts):
    tensor = torch.arange(rows * width).view(rows, width)
    ends = sorted(min(cut, rows) for cut in cuts)
    placed = Rows(tuple(tensor[a:b].clone() for a, b in zip([0, *ends], [*ends, rows], strict=True)))
    target = torch.full_like(tensor, -1)
    copy_rows([(target, placed)])
    assert torch.equal(target, tensor) and torch.equal(torch.cat(list(parts_of([placed]))), tensor)
    with pytest.raises(ValueError, match="in several places"):
        in_one_place({"w": placed})


# --- a worker that is told nonsense -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where, said",
    [
        ({"slots": 2, "ranks": 3}, "where.ranks must be 2, the number of endpoint.sockets"),
        ({"slots": 2, "ranks": 2, "whole": ["w", "v"]}, "where.whole names tensors that are not in the manifest"),
        ({"slots": 2, "ranks": 0}, "where.ranks has a value that is not allowed"),
        ({"slots": 2, "ranks": 2, "whole": [1]}, "where.whole has a value that is not allowed"),
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
