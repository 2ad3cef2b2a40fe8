"""Handles: what is exported can be opened by another process, exactly; a handle that claims too much opens nothing."""

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from transfer.engine import handle_check
from transfer.engine.handle_check import CudaTensor, check, host_id
from transfer.engine.handles import MEMFD_NAME, SEALS, Exporter, Importer
from transfer.engine.inert_pickle import DTYPE_BYTES, Global

torch.set_num_threads(1)


def raw(tensor):
    """A tensor's bytes in the order of its elements."""
    return tensor.detach().resolve_conj().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def told(tensor):
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def of_every_dtype():
    numbers = torch.arange(11)
    return {name: numbers.to(getattr(torch, name)) for name in DTYPE_BYTES}


SHAPES = {
    "a scalar": torch.tensor(2.5),
    "empty": torch.empty(0),
    "an empty row": torch.empty(3, 0, 2, dtype=torch.int64),
    "odd-sized": torch.arange(7, dtype=torch.uint8),
    "transposed": torch.randn(3, 5).t(),
    "strided": torch.randn(8, 6)[::2, 1::3],
    "expanded": torch.randn(1, 4).expand(3, 4),
    "with an offset": torch.randn(10)[3:],
    "a leaf that requires grad": torch.randn(2, 2, requires_grad=True),
    "a result that requires grad": torch.randn(2, 2, requires_grad=True) * 2,
    "a parameter": torch.nn.Parameter(torch.randn(3)),
    "a conjugate": torch.randn(3, dtype=torch.complex64).conj(),
}


@pytest.mark.parametrize("tensors", [of_every_dtype(), SHAPES], ids=["dtypes", "shapes"])
def test_tensors_travel_exactly(tensors):
    with Exporter() as exporter:
        handles = {name: exporter.add(name, tensor)[0] for name, tensor in tensors.items()}
        exporter.ready()
        with Importer() as importer:
            for name, tensor in tensors.items():
                received = importer.open(check(*told(tensor), handles[name]))
                assert (received.dtype, received.shape) == (tensor.dtype, tensor.shape), name
                assert raw(received) == raw(tensor), name
                assert not received.requires_grad


READER = """
import ast, hashlib, sys
import torch
from transfer.engine.handle_check import check
from transfer.engine.handles import Importer
dtype, shape, handle = ast.literal_eval(sys.stdin.readline())
with Importer() as importer:
    tensor = importer.open(check(dtype, shape, handle))
    print(hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest())
"""


def read_in_another_process(tensor, handle):
    line = repr((*told(tensor), handle))
    done = subprocess.run([sys.executable, "-c", READER], input=line, capture_output=True, text=True, timeout=60)
    return done.stdout.strip(), done.stderr


def test_another_process_reads_the_bytes_and_when_the_exporter_is_closed_is_told_that_they_are_gone():
    tensor = torch.randn(33, 5).bfloat16()
    with Exporter() as exporter:
        exporter.add("before", torch.zeros(3, dtype=torch.uint8))
        handle = exporter.add("w", tensor)[0]
        exporter.ready()
        assert read_in_another_process(tensor, handle) == (hashlib.sha256(raw(tensor)).hexdigest(), "")
    assert "ValueError: the trainer's memory is gone" in read_in_another_process(tensor, handle)[1]


def test_every_tensor_starts_at_a_multiple_of_256_bytes():
    with Exporter() as exporter:
        handles = [exporter.add("w", torch.zeros(size))[0][host_id()] for size in (1, 70, 0, 64, 5)]
    assert [handle[4] for handle in handles] == [0, 256, 768, 768, 1024]


def test_the_memory_is_sealed_against_writing_and_resizing():
    with Exporter() as exporter:
        handle = exporter.add("w", torch.zeros(3))[0][host_id()]
        exporter.ready()
        fd = handle[2]
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == SEALS
        for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 8192)):
            with pytest.raises(PermissionError):
                change()


def test_a_receiver_that_writes_into_a_tensor_changes_only_its_own_copy():
    tensor = torch.arange(4.0)
    with Exporter() as exporter:
        handle = exporter.add("w", tensor)[0]
        exporter.ready()
        with Importer() as first, Importer() as second:
            first.open(check("float32", [4], handle)).fill_(9)
            assert torch.equal(second.open(check("float32", [4], handle)), tensor)


def test_a_tensor_that_is_kept_outlives_the_importer_and_the_exporter():
    with Exporter() as exporter:
        handle = exporter.add("w", torch.arange(5000))[0]
        exporter.ready()
        with Importer() as importer:
            kept = importer.open(check("int64", [5000], handle))
    assert torch.equal(kept, torch.arange(5000))


def open_memory():
    descriptors = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if is_open(fd)]
    maps = Path("/proc/self/maps").read_text()
    return sum(MEMFD_NAME in link for link in descriptors) + maps.count(MEMFD_NAME)


def is_open(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_hundred_updates_leave_no_descriptor_no_mapping_and_no_shared_memory_entry():
    entries = set(os.listdir("/dev/shm"))
    for _ in range(100):
        with Exporter() as exporter:
            handle = exporter.add("w", torch.ones(300))[0]
            exporter.ready()
            with Importer() as importer:
                importer.open(check("float32", [300], handle))
                assert open_memory() > 0
    assert open_memory() == 0
    assert not {entry for entry in set(os.listdir("/dev/shm")) - entries if MEMFD_NAME in entry}


def test_a_failure_while_exporting_closes_the_memory():
    with pytest.raises(ValueError, match="'b' is on meta"), Exporter() as exporter:
        exporter.add("a", torch.ones(3))
        exporter.add("b", torch.ones(3, device="meta"))
    assert open_memory() == 0


KILLED = """
import time, torch
from transfer.engine.handles import Exporter
with Exporter() as exporter:
    handle = exporter.add("w", torch.ones(3))[0]
    exporter.ready()
    print(handle, flush=True)
    time.sleep(60)
"""


def test_after_kill_9_nothing_is_left_and_the_receiver_says_so():
    before = set(os.listdir("/dev/shm"))
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as trainer:
        handle = eval(trainer.stdout.readline())  # noqa: S307 - printed by this test's own child
        with Importer() as importer:
            importer.open(check("float32", [3], handle))
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait(timeout=30)
        with pytest.raises(ValueError, match="the trainer's memory is gone"), Importer() as importer:
            importer.open(check("float32", [3], handle))
    assert not {entry for entry in set(os.listdir("/dev/shm")) - before if str(trainer.pid) in entry}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.eye(3).to_sparse(), "make it a plain dense tensor"),
        (lambda: torch.ones(3, device="meta"), "is on meta: weights travel from a CPU or a CUDA device"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "has dtype qint8, allowed: "),
    ],
    ids=["sparse", "meta", "quantized"],
)
def test_a_tensor_that_cannot_travel_is_named_with_the_reason(make, reason):
    with Exporter() as exporter, pytest.raises(ValueError, match=f"'w'.*{reason}"):
        exporter.add("w", make())


# --- whose memory -----------------------------------------------------------------------------------------------------


def test_a_handle_for_other_devices_only_is_refused_with_the_devices_it_has():
    with pytest.raises(ValueError) as error:
        check("float32", [3], {"GPU-1": (), "GPU-2": ()})
    own = handle_check._own_uuids()[0]
    assert str(error.value) == f"IPC handle not found for GPU UUID {own}. Available UUIDs: ['GPU-1', 'GPU-2']"


def test_the_handle_for_this_host_is_used_and_others_are_ignored():
    with Exporter() as exporter:
        handle = exporter.add("w", torch.ones(3))[0]
        exporter.ready()
        with Importer() as importer:
            mixed = {"GPU-1": "rubbish", **handle, "GPU-2": None}
            assert importer.open(check("float32", [3], mixed)).tolist() == [1, 1, 1]


def fake_gpus(monkeypatch, uuids, reachable):
    """Let this process believe in GPUs with these UUIDs; it is on the first, which reaches those named."""
    monkeypatch.setattr(handle_check, "gpu_uuid", lambda index: uuids[index])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: uuids[other] in reachable)


def test_uuids_are_compared_in_lower_case_and_without_the_gpu_prefix(monkeypatch):
    fake_gpus(monkeypatch, ["ab-cd"], [])
    assert check("bfloat16", [2, 3], {"GPU-AB-CD": CUDA}).shape == (2, 3)


def test_another_gpus_handle_is_taken_only_where_peer_access_is_possible(monkeypatch):
    fake_gpus(monkeypatch, ["own", "near", "far"], ["near"])
    assert check("bfloat16", [2, 3], {"far": None, "near": CUDA}).shape == (2, 3)
    with pytest.raises(ValueError, match=r"not found for GPU UUID own. Available UUIDs: \['far'\]"):
        check("bfloat16", [2, 3], {"far": CUDA})


def test_its_own_gpus_handle_comes_before_a_peers(monkeypatch):
    fake_gpus(monkeypatch, ["own", "near"], ["near"])
    assert check("bfloat16", [2, 3], {"near": None, "own": CUDA}).shape == (2, 3)


# --- what is claimed: CUDA --------------------------------------------------------------------------------------------

CUDA = (
    *(torch.Tensor, torch.Size([2, 3]), (3, 1), 4, torch.storage.TypedStorage, torch.bfloat16, 5),
    *(b"\x03c" + b"h" * 64, 20, 512, False, b"/torch_12_345_0", 7, b"e" * 64, True),
)
INERT = tuple(Global(f"torch.{name}") if name else field for name, field in zip(
    ["Tensor", "", "", "", "storage.TypedStorage", "bfloat16", *[""] * 9], CUDA, strict=True
))  # fmt: skip


@pytest.mark.parametrize("fields", [CUDA, list(CUDA), INERT, (rebuild_cuda_tensor, CUDA), ("a mere name", CUDA)])
def test_a_cuda_handle_is_understood_in_each_form_it_comes_in(monkeypatch, fields):
    fake_gpus(monkeypatch, ["own"], [])
    storage = (CUDA[7], 20, 512, False, CUDA[11], 7, CUDA[13], True)
    assert check("bfloat16", [2, 3], {"own": fields}) == CudaTensor("bfloat16", (2, 3), (3, 1), 4, storage)


LIES = {
    0: [(Global("torch.Size"), "tensor class"), (type, "tensor class"), (None, "tensor class")],
    1: [((3, 2), "the message says shape"), ("ab", "the message says shape"), ((2.0, 3), "the message says shape")],
    2: [((3,), "stride"), ((-3, 1), "stride"), ((4, 1), "ends at byte 22 of its storage, which has 20"), (3, "stride")],
    3: [(5, "ends at byte 22"), (-1, "offset"), (True, "offset"), (2**60, "offset")],
    4: [(Global("torch.Tensor"), "storage class"), (dict, "storage class")],
    5: [(torch.float32, "the message says bfloat16, the handle torch.float32"), ("x" * 10**6, "the message says")],
    6: [(-1, "device index"), (1024, "device index"), ("0", "device index")],
    7: [(b"\x03e" + b"h" * 64, "expandable_segments"), (b"c" * 64, "IPC handle"), ("c" * 66, "IPC handle")],
    8: [(19, "which has 19"), (0, "storage size"), (-1, "storage size"), (2**60, "storage size")],
    9: [(-1, "storage offset"), (2**60, "storage offset"), (None, "storage offset")],
    10: [(1, "flag"), (None, "flag")],
    11: [
        (b"/torch_12_345_0\n", "counter file"),
        (b"/etc/passwd", "counter file"),
        (b"/torch_1_2_3/../x", "counter file"),
        ("/torch_12_345_0", "counter file"),
    ],
    12: [(-1, "reference counter"), (10_000, "reference counter")],
    13: [(b"e" * 63, "event handle"), (None, "event handle")],
    14: [(None, "flag"), ("yes", "flag")],
}


@pytest.mark.parametrize(
    ("index", "lie", "reason"),
    [(index, lie, reason) for index, lies in LIES.items() for lie, reason in lies],
    ids=[f"field {index}, lie {which}" for index, lies in LIES.items() for which in range(len(lies))],
)
def test_a_lie_in_any_field_of_a_cuda_handle_is_refused_before_torch_sees_it(monkeypatch, index, lie, reason):
    fake_gpus(monkeypatch, ["own"], [])
    with pytest.raises(ValueError, match=reason) as error:
        check("bfloat16", [2, 3], {"own": (*CUDA[:index], lie, *CUDA[index + 1 :])})
    assert len(str(error.value)) < 300


def test_a_cuda_handle_without_memory_is_only_good_for_an_empty_tensor(monkeypatch):
    fake_gpus(monkeypatch, ["own"], [])
    nothing = (None, 0, 0, False, None, 0, None, None)
    empty = (*CUDA[:1], (0, 3), (3, 1), 0, *CUDA[4:7], *nothing)
    assert check("bfloat16", [0, 3], {"own": empty}).storage is None
    with pytest.raises(ValueError, match="its storage, which has 0"):
        check("bfloat16", [2, 3], {"own": (*CUDA[:7], *nothing)})


@pytest.mark.parametrize("fields", [None, "x" * 15, (), CUDA[:14], (*CUDA, 1), (1, CUDA[:14]), {}])
def test_a_cuda_handle_of_the_wrong_form_is_refused(monkeypatch, fields):
    fake_gpus(monkeypatch, ["own"], [])
    with pytest.raises(ValueError, match="a CUDA handle has 15 fields"):
        check("bfloat16", [2, 3], {"own": fields})


# --- what is claimed: memfd -------------------------------------------------------------------------------------------


@pytest.fixture
def exported():
    with Exporter() as exporter:
        handle = exporter.add("w", torch.ones(2, 3))[0]
        exporter.ready()
        yield list(handle[host_id()])


def open_claim(fields, dtype="float32", shape=(2, 3)):
    with Importer() as importer:
        return importer.open(check(dtype, shape, {host_id(): fields}))


HOST_LIES = {
    0: [("file", "begins with 'memfd'")],
    1: [(0, "process id"), (-1, "process id"), ("self", "process id"), (2**22 + 1, "memory is gone")],
    2: [(-1, "descriptor"), ("../../x", "descriptor"), (10**6, "memory is gone")],
    3: [(1, "not the one that the handle means"), ("1", "descriptor or inode")],
    4: [(8, "not a multiple of 256"), (256, "ends outside"), (-256, "not a multiple"), (2**60, "not a multiple")],
    5: [(23, "24 bytes are needed, the handle has 23"), (25, "24 bytes are needed"), (None, "24 bytes are needed")],
    6: [("int32", "the message says float32, the handle int32")],
    7: [((3, 2), r"the message says shape \[2, 3\], the handle \(3, 2\)")],
}


@pytest.mark.parametrize(
    ("index", "lie", "reason"),
    [(index, lie, reason) for index, lies in HOST_LIES.items() for lie, reason in lies],
    ids=[f"field {index}, lie {which}" for index, lies in HOST_LIES.items() for which in range(len(lies))],
)
def test_a_lie_in_any_field_of_a_host_handle_is_refused(exported, index, lie, reason):
    assert torch.equal(open_claim(exported), torch.ones(2, 3))
    exported[index] = lie
    with pytest.raises(ValueError, match=reason):
        open_claim(exported)


def claim_of(fd, exported):
    return ["memfd", os.getpid(), fd, os.fstat(fd).st_ino, *exported[4:]]


@pytest.mark.parametrize("kind", ["a file", "a pipe", "a memfd of another name"])
def test_a_descriptor_that_is_not_a_trainers_memfd_is_refused_without_being_opened(exported, tmp_path, kind):
    (tmp_path / "secret").write_bytes(b"s" * 4096)
    reading, writing = os.pipe()
    fds = {
        "a file": os.open(tmp_path / "secret", os.O_RDONLY),
        "a pipe": reading,
        "a memfd of another name": os.memfd_create("other", os.MFD_ALLOW_SEALING),
    }
    os.pwrite(fds["a memfd of another name"], b"s" * 4096, 0)
    fcntl.fcntl(fds["a memfd of another name"], fcntl.F_ADD_SEALS, SEALS)
    try:
        with pytest.raises(ValueError, match="does not name memory that a trainer shares"):
            open_claim(claim_of(fds[kind], exported))
    finally:
        for fd in (*fds.values(), writing):
            os.close(fd)


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SEAL])
def test_memory_that_could_still_change_is_refused(exported, missing):
    fd = os.memfd_create(MEMFD_NAME, os.MFD_ALLOW_SEALING)
    try:
        os.pwrite(fd, b"s" * 4096, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS & ~missing)
        with pytest.raises(ValueError, match="is not sealed"):
            open_claim(claim_of(fd, exported))
        if missing != fcntl.F_SEAL_SEAL:
            return
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, missing)
        open_claim(claim_of(fd, exported))
    finally:
        os.close(fd)


def test_memory_of_another_user_is_refused(exported, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match=f"belongs to user {os.getuid()}, not to this one"):
        open_claim(exported)


@pytest.mark.parametrize("dtype", ["float33", "Tensor", "load", 5, None, "torch.float32"])
def test_a_dtype_that_is_none_is_refused_by_name(exported, dtype):
    with pytest.raises(ValueError, match=r"dtype .* is not known"):
        open_claim(exported, dtype=dtype)


@pytest.mark.parametrize("shape", [5, None, "ab", [2, -3], [2.0, 3], [True, 3], [1] * 65, [2**50], {}])
def test_a_shape_that_is_none_is_refused(exported, shape):
    with pytest.raises(ValueError, match="is not a list of sizes"):
        open_claim(exported, shape=shape)


@pytest.mark.parametrize("handle", [None, [], "x", {1: ()}, {"x" * 129: ()}, {str(n): () for n in range(65)}])
def test_a_handle_that_is_no_dict_of_uuids_is_refused(handle):
    with pytest.raises(ValueError, match="must be a dict of at most 64 GPU UUIDs"):
        check("float32", [3], handle)


@pytest.mark.parametrize("fields", [None, (), "x" * 8, CUDA])
def test_a_host_handle_of_the_wrong_form_is_refused(fields):
    with pytest.raises(ValueError, match=r"a host memory handle has 8 fields|begins with"):
        open_claim(fields)
