"""The table that the kernel works through, carried out here by the CPU; and the kernel itself, where there is a GPU."""

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.agreement.manifest import Manifest
from transfer.memory import far_copy, regions
from transfer.memory.digest import digest_of
from transfer.memory.far_copy import FarCopy, is_far
from transfer.memory.one_pass import Lying, OnePass, available
from transfer.memory.pieces import PIECE, SHORT, Table
from transfer.memory.regions import slot_bytes, views_of
from transfer.memory.sums import added, sums_digest
from transfer.worker.landing import Landing

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]
SIZES = [0, 1, 2, 3, 5, 31, 128, 1000]
CASTS = {1: torch.bfloat16, 2: torch.float16}
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e5m2]


def carried_out(table):
    """What the kernel does with its table; the digest."""
    sums = [0, 0]
    for source, target, first, told in table.pieces.tolist():
        nbytes, cast = told & 0xFFFFFFFF, told >> 40
        raw = ctypes.string_at(source, nbytes * (2 if cast else 1))
        if cast:
            floats = torch.frombuffer(bytearray(raw), dtype=torch.float32)
            raw = bytes(floats.to(CASTS[cast]).view(torch.uint8).tolist())
        if target:
            ctypes.memmove(target, raw, nbytes)
        for index, start in enumerate(range(0, nbytes, 8), first):
            word = int.from_bytes(raw[start : start + 8], "little")
            sums[0] += word * (index * 0x9E3779B97F4A7C15 % 2**64 | 1)
            sums[1] += (word ^ word >> 29) * (index * 0xC2B2AE3D27D4EB4F % 2**64 | 1)
    return sums_digest(*sums)


def tensor(size, dtype, device=CPU):
    values = torch.rand(size, generator=torch.Generator().manual_seed(size)) * 100
    return values.to(dtype).to(device)


def slot_for(tensors, device=CPU):
    manifest = Manifest.of({f"{index:02}": each for index, each in enumerate(tensors)})
    views = views_of(torch.zeros(slot_bytes(manifest), dtype=torch.uint8, device=device), manifest)
    return [views[f"{index:02}"] for index in range(len(tensors))]


def same(ones, others):
    raw = [[t.contiguous().view(-1).view(torch.uint8) for t in tensors] for tensors in (ones, others)]
    return all(torch.equal(*pair) for pair in zip(*raw, strict=True))


@given(st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from(DTYPES)), max_size=8), st.booleans())
def test_the_table_copies_casts_and_sums_every_byte_once(kinds, cast):
    sources = [tensor(size, dtype) for size, dtype in kinds]
    wanted = [t.to(torch.bfloat16) if cast and t.dtype is torch.float32 else t for t in sources]
    targets = slot_for(wanted)
    assert carried_out(OnePass(sources, targets, CPU).table) == digest_of(wanted, "sums:")
    assert same(targets, wanted)
    others = slot_for(wanted)
    assert carried_out(OnePass(targets, others, CPU, Lying.slot).table) == digest_of(wanted, "sums:")
    assert same(others, wanted)
    assert carried_out(OnePass(others, None, CPU, Lying.slot).table) == digest_of(wanted, "sums:")


def test_neighbours_in_slots_become_one_range_and_others_do_not():
    sources = slot_for([tensor(size, torch.bfloat16) for size in (1000, 3, 128)])
    targets = slot_for(sources)
    assert len(OnePass(sources, targets, CPU, Lying.slot).ranges) == 1
    assert len(OnePass(sources, targets, CPU).ranges) == 3, "gaps outside of slots belong to somebody else"
    assert len(OnePass(sources[::-1], targets[::-1], CPU, Lying.slot).ranges) == 3, "other places in the digest"


def test_long_tensors_are_cut_into_pieces():
    source = tensor(PIECE + 4, torch.float64)
    target = torch.zeros_like(source)
    table = OnePass([source], [target], CPU).table
    assert len(table) == 9 and carried_out(table) == digest_of([source], "sums:")
    assert torch.equal(source, target)


@given(st.lists(st.sampled_from([0, 1, SHORT // 4, SHORT // 4 + 1, PIECE // 4 + 1]), max_size=5), st.booleans())
def test_long_pieces_come_first_in_the_table_and_mixed_ones_are_the_same(sizes, mixed):
    sources = [tensor(size, torch.float32) for size in sizes]
    targets = slot_for(sources)
    ranges = OnePass(sources, targets, CPU).ranges
    table = Table.of(ranges, CPU, mixed)
    nbytes = [told & 0xFFFFFFFF for _, _, _, told in table.pieces.tolist()]
    assert all(each > SHORT for each in nbytes[: table.longs]) and all(each <= SHORT for each in nbytes[table.longs :])
    assert carried_out(table) == digest_of(sources, "sums:") and same(targets, sources)
    assert table.blocks(512, 7) == min(7, max(table.longs, -(-32 * (len(table) - table.longs) // 512)))


def test_tensors_with_holes_go_by_torch_first():
    square = tensor(100, torch.float32).view(10, 10).t()
    (target,) = slot_for([square])
    one_pass = OnePass([square], [target], CPU)
    assert one_pass.ranges == [(target.data_ptr(), 0, 0, 400, 3, 0)], "and are only read by the kernel"
    with pytest.raises(ValueError, match="contiguous"):
        OnePass([square], None, CPU)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_parts_of_rows_are_copied_stretch_by_stretch(heads, rows, first, dtype):
    whole = tensor(heads * rows * 1024, torch.float32).view(heads, rows, 1024)
    source = whole[:, :, 256 * first : 256 * first + 256]
    (target,) = slot_for([source.to(dtype)])
    one_pass = OnePass([source], [target], CPU)
    assert carried_out(one_pass.table) == digest_of([source.to(dtype)], "sums:")
    assert torch.equal(target, source.to(dtype))
    wide = torch.zeros(heads, rows, 512, dtype=dtype)
    one_pass = OnePass([source], [wide[:, :, 256:]], CPU)
    assert carried_out(one_pass.table) == digest_of([source.to(dtype)], "sums:"), "wherever it goes"
    assert torch.equal(wide[:, :, 256:], source.to(dtype)) and not wide[:, :, :256].any()
    assert len(one_pass.ranges) == heads * rows and "by torch" not in one_pass.plan


def test_stretches_that_are_short_or_end_within_a_word_go_by_torch_first():
    whole = tensor(8 * 1024, torch.bfloat16).view(8, 1024)
    for source in (whole[:, :100], whole[:, :301], whole[:, ::2]):
        (target,) = slot_for([source])
        assert OnePass([source], [target], CPU).ranges == [(target.data_ptr(), 0, 0, target.nbytes, 1, 0)]


def test_a_tensor_that_has_moved_or_changed_its_form_is_noticed():
    sources = [tensor(5, torch.float32), tensor(6, torch.float32)]
    one_pass = OnePass(sources, slot_for(sources), CPU)
    assert one_pass.fits([each.detach() for each in sources])
    assert not one_pass.fits([sources[0], sources[1].clone()])
    square = tensor(9, torch.float32).view(3, 3)
    one_pass = OnePass([square], slot_for([square]), CPU)
    others = [square.t(), square.view(9), square.view(torch.int32)]
    assert not any(one_pass.fits([other]) for other in others), "other bytes, or in another order"


@given(st.lists(st.sampled_from([0, 3, 400, 1000, 1024, 5000, 70000]), max_size=6), st.integers(0, 2))
def test_large_ranges_of_another_gpu_are_fetched_in_chunks_that_are_read_afterwards(sizes, cast):
    wanted = [tensor(size, torch.bfloat16 if index == cast else torch.float32) for index, size in enumerate(sizes)]
    sources = [each.float() for each in wanted]
    targets = slot_for(wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(far_copy, "CHUNK", 2**14), patch.setattr(far_copy, "LEAST", 2**12)
        ranges = OnePass(sources, targets, CPU).ranges
        far = FarCopy(filter(is_far, ranges), CPU)
        near = [each for each in ranges if not is_far(each)]
    digests = [carried_out(Table.of(near, CPU))]
    for chunk in far.chunks:
        assert chunk.nbytes <= 2**14
        ctypes.memmove(chunk.target, chunk.source, chunk.nbytes)
        digests.append(carried_out(chunk.table))
    assert added(digests) == digest_of(wanted, "sums:")
    assert same(targets, wanted)


def test_there_is_no_kernel_for_a_cpu():
    assert not available(CPU)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def gpu(function):
    for mark in needs_gpu:
        function = mark(function)
    return function


@gpu
@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from([*SIZES, 70_001]), st.sampled_from(DTYPES)), max_size=8), st.integers(0, 3))
def test_the_kernel_does_what_the_table_says(kinds, skipped):
    device = torch.device("cuda")
    assert available(device)
    sources = [tensor(size, dtype, device)[skipped:] for size, dtype in kinds]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wanted = [t.to(dtype) if t.dtype is torch.float32 else t for t in sources]
        targets = slot_for(wanted, device)
        digest, finite = OnePass(sources, targets, device).run()
        assert finite and same(targets, wanted)
        assert digest == digest_of([t.cpu() for t in wanted], "sums:") == digest_of(targets, "sums:")
        others = slot_for(wanted, device)
        assert OnePass(sources, others, device).run(with_digest=False) == (None, True) and same(others, wanted)


@gpu
@settings(max_examples=20)
@given(st.integers(1, 300), st.sampled_from([256, 1000, 2048, 4096, 5000]), st.booleans())
def test_the_kernel_copies_parts_of_rows(rows, columns, cast):
    device = torch.device("cuda")
    whole = tensor(rows * 3 * columns, torch.float32, device).view(rows, 3 * columns)
    source = whole[:, columns : 2 * columns] if cast else whole.bfloat16()[:, columns : 2 * columns]
    (target,) = slot_for([source.bfloat16()], device)
    one_pass = OnePass([source], [target], device, Lying.slots)
    digest, finite = one_pass.run()
    assert finite and torch.equal(target, source.bfloat16()) and "by torch" not in one_pass.plan
    assert digest == digest_of([target.cpu()], "sums:")
    source[-1, -1] = torch.nan
    assert not one_pass.run(with_digest=False)[1]


@gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_kernel_finds_a_value_that_is_not_finite_wherever_it_is(dtype, value):
    for place in (0, 1, 777, 1000):
        values = torch.ones(1001)
        values[place] = value
        one_pass = OnePass([values.to(dtype).cuda()], None, torch.device("cuda"))
        assert not one_pass.run()[1] and not one_pass.run(with_digest=False)[1]
    assert OnePass([torch.full((1001,), 300.0).to(dtype).cuda()], None, torch.device("cuda")).run()[1]


@gpu
def test_what_is_collected_meanwhile_frees_its_gpu_memory_before_or_after_the_work_is_recorded():
    device, before = torch.device("cuda"), gc.get_threshold()
    ones = torch.ones(1001, device=device)
    for _ in range(20):
        cycle = [regions.CudaRegion(regions.CUDA_PAGE, device)]
        cycle.append(cycle)
        del cycle
        gc.set_threshold(1)
        try:
            assert OnePass([ones], None, device).run()[1]
        finally:
            gc.set_threshold(*before)


@gpu
def test_the_kernel_finds_values_that_the_narrower_dtype_cannot_hold():
    large, device = torch.full((100,), 3.4e38, device="cuda"), torch.device("cuda")
    assert OnePass([large], None, device).run()[1]
    assert not OnePass([large], [torch.zeros(100, dtype=torch.bfloat16, device=device)], device).run()[1]


@gpu
def test_weights_that_are_copied_on_a_gpu_land_in_one_block():
    device = torch.device("cuda")
    held = {"a": tensor(1001, torch.bfloat16, device), "b": tensor(31, torch.float32, device)}
    held["tied"] = held["a"]
    manifest = Manifest.of(held)
    landing, before = Landing(manifest, held), {name: each.clone() for name, each in held.items()}
    staged = views_of(torch.zeros(slot_bytes(manifest), dtype=torch.uint8, device=device), manifest)
    landing.prepare([staged], device, copied=True, empty=False)
    assert all(torch.equal(held[name], each) for name, each in before.items()), "what was there stays"
    staged["a"].fill_(2), staged["b"].fill_(3)
    assert landing.copy(staged, unchecked=True, with_digest=True) == digest_of([held["a"], held["b"]])
    assert {float(each[0]) for each in held.values()} == {2.0, 3.0} and float(held["tied"][5]) == 2.0
    assert held["b"].data_ptr() - held["a"].data_ptr() == manifest.entries[1].offset


@gpu
def test_the_kernel_is_there_also_for_a_thread_that_has_not_asked_cuda_for_anything():
    program = (
        "import threading, torch\n"
        "from transfer.memory.one_pass import available\n"
        "torch.ones(1, device='cuda')\n"  # the context is this thread's
        "found = []\n"
        "thread = threading.Thread(target=lambda: found.append(available(torch.device('cuda:0'))))\n"
        "thread.start(), thread.join()\n"
        "assert found == [True], found\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
