import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from worker_process import Float8Model, OddModel

from transfer.memory.digest import Hasher, digest_of

TENSORS = [torch.arange(5, dtype=torch.int16), torch.tensor(3.0), torch.empty(0), torch.tensor([True, False, True])]


def test_on_the_host_it_is_xxh3_of_the_bytes_in_order():
    raw = b"".join(tensor.numpy().tobytes() for tensor in TENSORS)
    assert digest_of(TENSORS) == f"xxh3:{xxhash.xxh3_128_hexdigest(raw)}"
    assert digest_of([]) == f"xxh3:{xxhash.xxh3_128_hexdigest(b'')}"


def test_a_tensor_at_a_time_gives_the_same():
    hasher = Hasher()
    for tensor in TENSORS:
        hasher.add(tensor)
    assert hasher.digest() == digest_of(TENSORS)


@pytest.mark.parametrize("kind", ["xxh3:", "sums:"])
def test_the_order_of_elements_counts_and_not_how_they_lie_in_memory(kind):
    square = torch.arange(12.0).reshape(3, 4)
    assert digest_of([square.t()], kind) == digest_of([square.t().contiguous()], kind) != digest_of([square], kind)


@pytest.mark.parametrize("model", [OddModel, Float8Model])
def test_every_dtype_has_both_kinds(model):
    weights = list(model(1).state_dict().values())
    other = list(model(2).state_dict().values())
    for kind in ("xxh3:", "sums:"):
        assert digest_of(weights, kind).startswith(kind) and len(digest_of(weights, kind)) == len(kind) + 32
        assert digest_of(weights, kind) == digest_of([w.clone() for w in weights], kind) != digest_of(other, kind)


@given(st.binary(min_size=1, max_size=100), st.data())
def test_one_changed_bit_or_two_swapped_bytes_change_both_kinds(raw, data):
    changed = bytearray(raw)
    if data.draw(st.booleans()):
        changed[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        i, j = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, len(raw) - 1))
        changed[i], changed[j] = raw[j], raw[i]
    for kind in ("xxh3:", "sums:"):
        same = digest_of([_tensor(raw)], kind) == digest_of([_tensor(bytes(changed))], kind)
        assert same == (bytes(changed) == raw)


def test_where_one_tensor_ends_and_the_next_begins_is_the_manifests_business():
    whole, halves = torch.arange(8), [torch.arange(4), torch.arange(4, 8)]
    assert digest_of([whole]) == digest_of(halves)


def test_the_sums_know_the_place_of_every_byte_and_not_how_they_were_worked_through(monkeypatch):
    raw = torch.arange(203, dtype=torch.uint8)
    swapped = torch.cat([raw[64:128], raw[:64], raw[128:]])
    negated = torch.cat([raw[:7], raw[7:16] ^ 128, raw[16:]])
    longer = torch.cat([raw, torch.ones(1, dtype=torch.uint8)])
    weights = [[raw], [swapped], [negated], [longer], [raw[:-1]], [raw[:100], raw[100:]], [raw[:99], raw[99:]]]
    digests = [digest_of(each, "sums:") for each in weights]
    assert len(set(digests)) == len(weights)
    monkeypatch.setattr("transfer.memory.sums.PIECE", 64)
    assert [digest_of(each, "sums:") for each in weights] == digests


def test_signs_that_flip_in_pairs_do_not_cancel():
    values = torch.arange(1.0, 9.0)
    for dtype in (torch.float32, torch.float64):
        assert digest_of([values.to(dtype)], "sums:") != digest_of([-values.to(dtype)], "sums:")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_sums_are_the_same_on_gpu_and_host():
    weights = list(OddModel(1).state_dict().values())
    assert digest_of([w.cuda() for w in weights]) == digest_of(weights, "sums:")


def _tensor(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
