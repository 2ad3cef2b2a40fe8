"""`python -m transfer.bench`: real runs on a tiny model, and what it refuses, reports and leaves behind."""

import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from bench_command import main_here
from safetensors.torch import save_file
from sizes import in_ci, in_full

from transfer.bench import gpu, gpu_bars, gpu_measure, gpu_peers, measure, packing, peers, table
from transfer.bench.gpu import SPARE_BYTES, Gpus
from transfer.bench.lab import Unavailable
from transfer.bench.relay import Relay
from transfer.bench.shapes import BenchError, Model, model_named
from transfer.bench.source import STATES, Source
from transfer.bench.ways import CHANNELS, CPU, CUDA, NCCL, PEERS, Control, Parts, Unit, our_names, selected
from transfer.memory.digest import as_bytes

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "odd": [13],
    "after odd": {"dtype": "F32", "shape": [3, 5]},
    "bool": {"dtype": "BOOL", "shape": [7]},
    "fp8": {"dtype": "F8_E4M3", "shape": [9]},
    "int64": {"dtype": "I64", "shape": [2]},
    "scalar": [],
    "large": [300, 70],
}
TINY_MODEL = Model(
    "tiny",
    {
        "odd": ("bfloat16", (13,)),
        "after odd": ("float32", (3, 5)),
        "bool": ("bool", (7,)),
        "fp8": ("float8_e4m3fn", (9,)),
        "int64": ("int64", (2,)),
        "scalar": ("bfloat16", ()),
        "large": ("bfloat16", (300, 70)),
    },
)
MARK = "TRANSFER_BENCH_TEST"  # an environment variable that all processes of one run have
DEADLINE_S = 90.0

pytestmark = pytest.mark.usefixtures("default_signals")


class Run:
    """One bench in processes of its own, with its own folder for temporary files."""

    def __init__(self, folder, *arguments):
        self.mark = secrets.token_hex(8)
        self.temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # a short name, for the sockets of Ray
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        variables = {"PYTHONPATH": path, "TMPDIR": str(self.temporary), MARK: self.mark}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "transfer.bench", *arguments],
            cwd=folder,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.process:
            self.process.kill()
        shutil.rmtree(self.temporary)

    def ended(self, timeout=DEADLINE_S):
        """(exit code, stdout, stderr), and nothing is left of it."""
        out, err = self.process.communicate(timeout=timeout)
        wait_until(lambda: not self.processes(), "processes are left")
        assert self.files() == []
        return self.process.returncode, out, err

    def processes(self):
        """The command lines of all processes of this run."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
            except OSError:
                continue  # gone meanwhile, or not ours to read
        return [line for line in found if line]  # a zombie has none

    def files(self):
        """What it has in the temporary folder and in /dev/shm."""
        return [*self.temporary.iterdir(), *Path("/dev/shm").glob(f"transfer-bench-{self.process.pid}-*")]


def wait_until(condition, what, timeout=30.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def shapes_file(folder):
    path = folder / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def bench(folder, *arguments):
    folder.mkdir(exist_ok=True)
    with Run(folder, "--shapes", shapes_file(folder), *arguments) as run:
        return run.ended()


@pytest.fixture(scope="module")
def over_http(tmp_path_factory):
    """A run of everything that needs no Ray: its JSON and its table."""
    folder = tmp_path_factory.mktemp("bench")
    code, out, err = bench(folder, "--senders", "http", "--repeats", "3", "--json", "report.json")
    assert code == 0, err
    return json.loads((folder / "report.json").read_text()), out


# --- a run ------------------------------------------------------------------------------------------------------------


def test_every_way_is_timed_and_leaves_the_right_bytes_with_the_receiver(over_http):
    (model,) = over_http[0]["models"]
    rows = {row["way"]: row for row in model["rows"]}
    assert model["bytes"] == TINY_MODEL.nbytes
    assert list(rows) == ["memcpy", "memcpy-by-tensor", *selected(["http"], [], [])]
    assert len(rows) == 2 + 12 + 7
    assert [row["failed"] for row in rows.values() if "failed" in row] == []
    assert all(row["verified"] for way, row in rows.items() if not way.startswith("memcpy"))
    for way, row in rows.items():
        assert row["n"] == 3 or way == "memcpy"
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert row["gb_per_s"] == pytest.approx(TINY_MODEL.nbytes / row["ms"]["median"] / 1e6)
        assert row["times_memcpy"] == pytest.approx(row["ms"]["median"] / row["memcpy_ms"])


def test_ours_also_tell_their_parts_and_the_bytes_of_their_messages(over_http):
    rows = {row["way"]: row for row in over_http[0]["models"][0]["rows"]}
    for way in our_names(["http"]):
        parts = [rows[way][name] for name in ("write_ms", "flip_ms", "control_ms")]
        assert all(part > 0 for part in parts) and sum(parts) < rows[way]["ms"]["max"]
        assert 50 < rows[way]["control_bytes_bodies"] < rows[way]["control_bytes_wire"] < 5000
    digest, without = rows["ipc-arena-view-digest-http"], rows["ipc-arena-view-off-http"]
    assert digest["control_bytes_bodies"] > without["control_bytes_bodies"] + 32  # 128 bits in hex
    assert rows["one-shot-http"]["control_bytes_wire"] > digest["control_bytes_wire"]
    assert rows["one-shot-http"]["flip_ms"] > 0


def test_the_table_has_a_line_for_every_way_and_for_every_bar(over_http):
    report, out = over_http
    (model,) = report["models"]
    lines = out.splitlines()
    for row in model["rows"]:
        (line,) = [line for line in lines[: len(model["rows"]) + 3] if line.split()[:1] == [row["way"]]]
        assert line.endswith("-" if row["way"].startswith("memcpy") else "right")
    assert len(model["bars"]) == 2 * 5
    assert sum(line.startswith(("OK ", "missed ")) for line in lines) == len(model["bars"])


def test_json_alone_is_all_that_goes_to_stdout(tmp_path, capsys):
    main_here("--shapes", shapes_file(tmp_path), "--only", "raw-http", "--repeats", "1", "--json")
    rows = json.loads(capsys.readouterr().out)["models"][0]["rows"]
    assert [row["way"] for row in rows] == ["memcpy", "memcpy-by-tensor", "raw-http"]


@pytest.mark.slow
def test_over_ray_every_way_is_timed_and_right(tmp_path):
    code, out, err = bench(tmp_path, "--senders", "ray", "--repeats", "2", "--json")
    assert code == 0, err
    rows = {row["way"]: row for row in json.loads(out)["models"][0]["rows"]}
    assert {"ipc-arena-view-digest-ray", "ipc-live-copy-off-ray", "disk-digest-ray", "one-shot-ray", "ray-store"} < set(
        rows
    )
    assert [row["failed"] for row in rows.values() if "failed" in row] == []
    assert all(row["verified"] for way, row in rows.items() if not way.startswith("memcpy"))


THOSE_WITH_A_BAR = ("--only", "ipc-arena-view-off-http,ipc-arena-view-digest-http", "--repeats", "9")
EVERY_WAY = ("--repeats", "3")


@pytest.mark.parametrize("ways", [in_ci(THOSE_WITH_A_BAR), in_full(EVERY_WAY)])
def test_half_a_gigabyte_arrives_with_a_flip_below_a_millisecond(tmp_path, ways):
    with Run(tmp_path, "--shapes", "512mb", "--json", *ways) as run:
        code, out, err = run.ended(560)
    assert code == 0, err
    (model,) = json.loads(out)["models"]
    assert [row for row in model["rows"] if "failed" in row] == []
    assert [bar for bar in model["bars"] if bar["what"].startswith("flip") and not bar["met"]] == []


# --- the end ----------------------------------------------------------------------------------------------------------


OVER_HTTP = "raw-http,safetensors-shm,ipc-arena-view-off-http,disk-digest-http"


@pytest.mark.parametrize(
    ("ways", "number", "code"),
    [
        pytest.param(OVER_HTTP, signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(OVER_HTTP, signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param("safetensors-shm,ipc-arena-view-off-ray,ray-store", signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_interrupted_leaves_nothing_behind(tmp_path, ways, number, code):
    with Run(tmp_path, "--shapes", shapes_file(tmp_path), "--only", ways, "--repeats", "1000000") as run:
        for line in run.process.stderr:
            if "round" in line:
                break
        assert len(run.processes()) >= 4  # trainer, receivers, and multiprocessing's own
        assert any(path.is_relative_to("/dev/shm") for path in run.files())
        os.killpg(run.process.pid, number)  # as a terminal does
        assert run.ended()[0] == code


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_no_process_behind(tmp_path):
    ways = "ipc-arena-view-off-http,ipc-arena-copy-off-http,gloo-by"
    with Run(tmp_path, "--shapes", shapes_file(tmp_path), "--only", ways, "--repeats", "1000000") as run:
        for line in run.process.stderr:
            if "round" in line:
                break
        run.process.kill()
        run.process.communicate(timeout=DEADLINE_S)
        wait_until(lambda: not run.processes(), "processes are left")


def test_what_a_killed_run_has_left_in_shared_memory_is_removed_by_a_later_one(tmp_path):
    gone = 2**22 + 1  # no process can have this number
    old, living, fresh, other = (
        tmp_path / f"transfer-bench-{name}" for name in (f"{gone}-a", f"{os.getpid()}-b", f"{gone}-c", "x")
    )
    for folder in (old, living, fresh, other):
        folder.mkdir()
    for folder in (old, living, other):
        os.utime(folder, (0, 0))
    peers.remove_left(tmp_path)
    assert {folder for folder in (old, living, fresh, other) if folder.exists()} == {living, fresh, other}


# --- what cannot be done ----------------------------------------------------------------------------------------------


def called(folder, *arguments):
    command = [sys.executable, "-m", "transfer.bench", *arguments]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=30, check=False)


def test_help_answers_at_once_because_it_imports_little_and_neither_torch_nor_ray(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "transfer.bench", "--help"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    imported = {line.rsplit("|", 1)[-1].strip() for line in answer.stderr.splitlines()}
    assert "--shapes" in answer.stdout and "argparse" in imported
    assert not imported & {"torch", "ray", "numpy", "requests", "starlette"}
    assert len(imported) < 250


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--shapes", "7b"], "qwen2.5-7b"),
        (["--shapes", ""], "--shapes"),
        (["--shapes", "broken.json"], "broken.json"),
        (["--shapes", "list.json"], "JSON object"),
        (["--shapes", "negative.json"], "'w'"),
        (["--shapes", "dtype.json"], "'F4'"),
        (["--shapes", "empty.json"], "any bytes"),
        (["--shapes", "short.safetensors"], "safetensors"),
        (["--repeats", "0"], "--repeats"),
        (["--repeats", "many"], "--repeats"),
        (["--only", "nccl"], "nccl"),
        (["--skip", "nccl"], "nccl"),
        (["--only", "ray-store", "--senders", "http"], "no way"),
        (["--senders", "grpc"], "grpc"),
        (["--device", "gpu"], "cuda"),
        (["--device", "cuda:1 "], "cuda"),
        (["--device", "cuda:999"], "CUDA device"),
        (["--device", "cuda", "--receiver", "cpu"], "--receiver"),
        (["--receiver", "cuda:1"], "--device cuda"),
        (["--device", "cuda", "--only", "disk"], "disk"),
        (["--scale", "0"], "--scale"),
        (["--scale", "2"], "--scale"),
        (["--json", "nowhere/report.json"], "nowhere"),
        (["--rounds", "3"], "--rounds"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path, arguments, word, capsys, monkeypatch):
    files = {
        "broken.json": "{",
        "list.json": "[]",
        "negative.json": '{"w": [-1]}',
        "dtype.json": '{"w": {"dtype": "F4", "shape": [1]}}',
        "empty.json": '{"w": [0]}',
        "short.safetensors": "abc",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main_here(*arguments)
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("error: ") and word in line


def test_from_the_shell_it_is_the_same_line_and_exit_code(tmp_path):
    answer = called(tmp_path, "--shapes", "7b")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert len(answer.stderr.splitlines()) == 1


def test_weights_that_do_not_fit_into_the_memory_are_refused_before_anything_is_timed(tmp_path, capsys):
    (tmp_path / "huge.json").write_text(json.dumps({"w": [2**50]}))
    with pytest.raises(SystemExit) as ended:
        main_here("--shapes", f"1mb,{tmp_path}/huge.json")
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    assert re.fullmatch(r"error: huge needs \d+\.\d GB of memory .*can be used here\n", told.err)


# --- the ways ---------------------------------------------------------------------------------------------------------


def timed(folder, *names):
    return {row.way: row for row in measure.timed_model(TINY_MODEL, names, 1, folder, None, measure.Progress())}


def test_a_way_that_cannot_run_is_a_row_with_the_reason_beside_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "SHM", str(tmp_path / "missing"))
    rows = timed(tmp_path, "safetensors-shm", "raw-http", "ray-store")
    assert "No such file" in rows["safetensors-shm"].failed
    assert rows["ray-store"].failed == "no Ray was started"
    assert rows["raw-http"].verified and len(rows["raw-http"].samples) == 1
    text = table.table_text(TINY_MODEL, [table.row_json(row, TINY_MODEL) for row in rows.values()], [])
    assert "safetensors-shm   no figures: FileNotFoundError" in text


def test_a_receiver_that_holds_other_bytes_than_the_trainer_is_found_out(tmp_path, monkeypatch):
    honest = peers._pieces

    def one_byte_off(source):
        first, *others = honest(source)
        yield bytes([first[0] ^ 1]) + bytes(first[1:])
        yield from others

    monkeypatch.setattr(peers, "_pieces", one_byte_off)
    row = timed(tmp_path, "raw-http")["raw-http"]
    assert row.failed.startswith("the receiver holds xxh3:") and not row.verified and row.samples == []


def test_a_process_that_dies_takes_only_its_own_ways_along(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "_pickled", lambda weights: os.kill(peer_pid(), signal.SIGKILL))

    def peer_pid():
        (pid,) = [child.pid for child in made]
        return pid

    made = []
    honest = peers.Peer.__init__

    def noted(self, lab):
        honest(self, lab)
        made.append(self._process)

    monkeypatch.setattr(peers.Peer, "__init__", noted)
    rows = timed(tmp_path, "pickle-http", "raw-http", "ipc-arena-view-off-http")
    assert rows["pickle-http"].failed and rows["raw-http"].failed
    assert rows["ipc-arena-view-off-http"].verified


def test_ways_are_chosen_by_parts_of_their_names_and_by_sender():
    assert selected(["http", "ray"], ["arena-view"], ["off"]) == [
        "ipc-arena-view-digest-http",
        "ipc-arena-view-full-http",
        "ipc-arena-view-digest-ray",
    ]
    assert not [name for name in selected(["http"], [], []) if "ray" in name]
    assert not [name for name in selected(["ray"], [], []) if "http" in name]
    assert set(selected(["http", "ray"], [], [])) == {*our_names(), *PEERS[CPU]}
    assert set(selected(["http", "ray"], [], [], CUDA)) == {*our_names(device=CUDA), *PEERS[CUDA]}


def test_receivers_are_opened_together_as_far_as_the_memory_goes():
    units = [
        Unit([name], holds, peak, None) for name, holds, peak in (("a", 2, 0), ("b", 3, 1), ("c", 1, 6), ("d", 9, 9))
    ]
    processes = 3 * measure.PROCESS_BYTES
    nbytes = 10**9

    def grouped(copies):
        groups, too_big = measure._grouped(units, nbytes, copies * nbytes + processes)
        return [[unit.names[0] for unit in group] for group in groups], [unit.names[0] for unit in too_big]

    assert grouped(12) == ([["a", "b", "c"]], ["d"])
    assert grouped(11) == ([["a", "b"], ["c"]], ["d"])
    assert grouped(2) == ([["a"]], ["b", "c", "d"])


# --- the models, the weights and the relay ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "nbytes"),
    [
        ("1mb", 40, 1_000_000),
        ("512mb", 300, 512_025_600),
        ("qwen2.5-0.5b", 290, 2 * 494_032_768),
        ("qwen2.5-7b", 339, 2 * 7_615_616_512),
        ("qwen3-30b-a3b", 18_867, 2 * 30_532_122_624),
    ],
)
def test_named_models_have_the_tensors_and_the_bytes_of_their_checkpoints(name, tensors, nbytes):
    model = model_named(name)
    assert (len(model.tensors), model.nbytes) == (tensors, nbytes)
    assert nbytes == sum(2 * math.prod(shape) for _, shape in model.tensors.values())


def test_a_scaled_model_has_as_many_tensors_of_which_each_is_shorter():
    model = model_named("qwen2.5-0.5b").scaled(0.25)
    assert len(model.tensors) == 290
    assert model.tensors["model.embed_tokens.weight"] == ("bfloat16", (37984, 896))
    tiny = TINY_MODEL.scaled(0.1).tensors
    assert (tiny["odd"][1], tiny["int64"][1], tiny["scalar"][1], tiny["large"][1]) == ((1,), (1,), (), (30, 70))


def test_a_model_is_read_from_json_and_from_a_safetensors_file(tmp_path):
    assert model_named(shapes_file(tmp_path)) == TINY_MODEL
    path = tmp_path / "tiny.safetensors"
    save_file({n: t.contiguous() for n, t in Source(TINY_MODEL).weights.items()}, path)
    assert model_named(str(path)) == TINY_MODEL


def test_a_change_changes_every_tensor_and_leaves_all_values_finite():
    source = Source(TINY_MODEL)
    other = source.copy()
    digests = set()
    for _ in range(STATES):
        before = {name: tensor.clone() for name, tensor in source.weights.items()}
        source.change()
        digests.add(source.digest())
        for name, tensor in source.weights.items():
            assert not torch.equal(tensor.view(torch.uint8) if tensor.dim() else tensor, as_before(before[name]))
            assert tensor.float().isfinite().all()
    assert len(digests) == STATES
    assert other.digest() == source.digest()  # after a full circle


def as_before(tensor):
    return tensor.view(torch.uint8) if tensor.dim() else tensor


def test_the_relay_counts_every_byte_of_both_directions_and_passes_on_the_end():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo_twice():
            peer, _ = listener.accept()
            with peer:
                while data := peer.recv(2**16):
                    peer.sendall(data + data)

        server = threading.Thread(target=echo_twice)
        server.start()
        with Relay(f"http://127.0.0.1:{listener.getsockname()[1]}") as relay:
            host, port = relay.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), 10) as connection:
                connection.settimeout(10)
                connection.sendall(bytes(100_000))
                connection.shutdown(socket.SHUT_WR)
                received = 0
                while data := connection.recv(2**16):
                    received += len(data)
        server.join(10)
        assert not server.is_alive()
        assert (received, relay.bytes) == (200_000, 300_000)


def test_renewed_weights_have_the_same_values_in_other_memory():
    source = Source(TINY_MODEL)
    before, places = source.digest(), [tensor.data_ptr() for tensor in source.weights.values()]
    kept = [tensor.data for tensor in source.weights.values()]
    source.renew()
    assert source.digest() == before
    assert not {tensor.data_ptr() for tensor in source.weights.values()} & set(places)
    assert len(kept) == len(places)


@pytest.mark.parametrize("nbytes", [1, 100, 42_000, 10**6])
def test_tensors_are_packed_into_buffers_up_to_a_size_and_taken_apart_again(nbytes):
    source = Source(TINY_MODEL)
    entries = source.manifest.entries
    groups = packing.buckets(entries, nbytes)
    assert [entry for group in groups for entry in group] == list(entries)
    assert all(len(group) == 1 or sum(entry.nbytes for entry in group) <= nbytes for group in groups)
    taken = {name: torch.zeros_like(tensor) for name, tensor in source.weights.items()}
    for group in groups:
        packing.unpack(packing.packed(source.weights, group), taken, group)
    assert all(torch.equal(as_bytes(taken[name]), as_bytes(source.weights[name])) for name in taken)


# --- between GPUs, with the CPU in their place ------------------------------------------------------------------------


class HostGpus(Gpus):
    """Memory of `free` bytes, as it is seen one time after the other; a million more is used each time one looks."""

    def __init__(self, same, *free):
        super().__init__("cpu", "cpu:0")  # the same device by another name: the receiver's is not what a CPU run has
        self.same = same
        self._free = list(free) or [10**12]
        self._used = 0

    def synchronize(self):
        pass

    def release(self):
        pass

    def used(self):
        self._used += 10**6
        return self._used

    def free(self, device):
        return self._free.pop(0) if len(self._free) > 1 else self._free[0]


def timed_on(gpus, folder, only=()):
    names = selected(["http"], only, [], CUDA)
    rows = gpu_measure.timed_on_gpus(TINY_MODEL, names, 2, gpus, (folder, None), measure.Progress())
    return {row.way: row for row in rows}


def test_every_way_between_gpus_leaves_the_right_bytes_or_says_why_it_cannot_run(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = timed_on(HostGpus(same=True), tmp_path / "one")
    two = timed_on(HostGpus(same=False), tmp_path / "two", ["nccl", "view"])
    ours = our_names(["http"], CUDA)
    nccl = {name for name in ours if name.startswith("nccl")}  # refuses a machine without GPUs
    assert {name for name, row in one.items() if row.failed} == {*NCCL, *nccl}
    assert "--receiver" in one["nccl-packed"].failed
    assert {name for name, row in two.items() if row.failed} == {n for n in ours if "view" in n} | nccl
    assert "torch sees none" in two["nccl-off-http"].failed
    rows = {**one, **{name: two[name] for name in NCCL}}
    ways = [name for name in selected(["http"], [], [], CUDA) if name not in nccl]
    assert [name for name in ways if not rows[name].verified] == []
    assert all(len(rows[name].samples) == 2 for name in ways)
    second = [name for name in ways if "digest" in name or name == "nccl-packed"]  # in one process with another way
    assert {name: rows[name].extra_bytes for name in ways} == {n: 10**6 * (1 + (n in second)) for n in ways}
    assert len(one["memcpy"].samples) == gpu_measure.LIMIT_ROUNDS * (len(CHANNELS[CUDA]) - 1 + 3)  # before each process


def test_a_way_for_which_the_gpu_is_too_small_is_skipped_and_a_model_is_refused(tmp_path):
    short = SPARE_BYTES + int(2.5 * TINY_MODEL.nbytes)
    with pytest.raises(BenchError, match=r"tiny needs 4\.3 GB of cpu's memory.*--scale"):
        timed_on(HostGpus(True, short), tmp_path)
    rows = timed_on(HostGpus(True, 10**12, short), tmp_path, ["handle-packed", "arena-view-off"])
    assert "memory" in rows["ipc-arena-view-off-http"].failed
    assert rows["handle-packed"].verified


def test_memory_is_looked_for_on_the_gpu_that_needs_it():
    class Two(Gpus):
        def free(self, device):
            return SPARE_BYTES + {"cuda:0": 300, "cuda:1": 100}[str(device)]

    one, two = Two("cuda:0", "cuda:0"), Two("cuda:0", "cuda:1")
    assert one.lacks(100, (2, 1)) == two.lacks(100, (3, 1)) == ""
    assert "cuda:0" in one.lacks(101, (2, 1)) and "cuda:0" in two.lacks(100, (4, 0))
    assert "cuda:1" in two.lacks(100, (0, 2))


@pytest.mark.parametrize(
    ("count", "receiver", "word"),
    [
        (0, "cuda:0", "no CUDA device"),
        (1, "cuda:1", "--receiver cuda:1: torch sees 1 CUDA device here"),
        (2, "cuda:1", "no peer access"),
    ],
)
def test_gpus_that_are_not_there_are_refused(count, receiver, word, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: False)
    with pytest.raises(BenchError, match=word):
        gpu.found("cuda:0", receiver)


def test_what_does_not_end_in_time_is_given_up():
    never = threading.Event()
    began = time.monotonic()
    with pytest.raises(Unavailable, match="waiting for nothing"):
        gpu_peers._within(0.05, "waiting for nothing", never.wait)
    assert time.monotonic() - began < 5
    never.set()
    with pytest.raises(ZeroDivisionError):
        gpu_peers._within(5, "dividing", lambda: 1 / 0)


def test_the_table_of_gpus_begins_with_the_machine_and_ends_with_what_the_ways_are(tmp_path, capsys, monkeypatch):
    told = {"date": "2026-11-22", "gpus": ["cuda:0: H200"] * 2, "driver": "580.1", "cuda": "13.0"}
    monkeypatch.setattr(gpu, "found", lambda sender, receiver: HostGpus((sender, receiver) == ("cuda:0", "cuda:0")))
    monkeypatch.setattr(gpu, "machine", lambda gpus: told)
    options = ("--shapes", shapes_file(tmp_path), "--only", "handle-packed", "--repeats", "1")
    main_here("--device", "cuda", *options, "--json", str(tmp_path / "report.json"))
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"2026-11-22; cuda:0: H200; driver 580.1, CUDA 13.0, torch {torch.__version__}"
    assert out.splitlines()[-2].startswith("nccl-by-tensor ") and "disk" not in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["machine"].items() >= told.items()
    assert [row["way"] for row in report["models"][0]["rows"]] == ["memcpy", "memcpy-by-tensor", "handle-packed"]
    assert report["models"][0]["rows"][2]["extra_gpu_bytes"] == 10**6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_way_is_timed_and_right(tmp_path):
    code, out, err = bench(tmp_path, "--device", "cuda", "--senders", "http", "--repeats", "2", "--json")
    assert code == 0, err
    rows = {row["way"]: row for row in json.loads(out)["models"][0]["rows"]}
    failed = {way: row["failed"] for way, row in rows.items() if "failed" in row}
    assert failed.keys() == {way for way in rows if way.startswith("nccl")}, failed
    assert all(row["verified"] for way, row in rows.items() if way not in failed and not way.startswith("memcpy"))


# --- the bars ---------------------------------------------------------------------------------------------------------


def row_of(way, seconds, write, flip, wire):
    row = measure.Row(way, [seconds] * 3, [0.01] * 3, [Parts(write, flip, 0.001)] * 3, Control(300, wire), True)
    return table.row_json(row, Model("1mb", {"w": ("bfloat16", (500_000,))}))


def test_a_bar_is_met_or_missed_by_the_figure_that_was_measured():
    small = Model("1mb", {"w": ("bfloat16", (500_000,))})
    good = table.bars_json([row_of("ipc-arena-view-digest-http", 0.005, 0.0111, 0.001, 1023)], small)
    bad = table.bars_json([row_of("ipc-arena-view-digest-http", 0.0051, 0.0112, 0.0011, 1024)], small)
    assert [bar["met"] for bar in good] == [True] * 5
    assert [bar["met"] for bar in bad] == [False, False, False, True, False]
    assert [round(bar["figure"], 1) for bar in bad] == [89.3, 1.1, 5.1, 300, 1024]
    assert table.bars_json([row_of("ipc-arena-copy-digest-http", 1, 1, 1, 9999)], small) == []


def test_the_table_says_when_other_work_disturbed_the_run():
    model = model_named("512mb")

    def text(*seconds):
        row = table.row_json(measure.Row("memcpy", list(seconds), list(seconds)), model)
        return table.table_text(model, [row], []).splitlines()[-1]

    assert text(0.030, 0.031, 0.032).endswith("steady")
    assert text(0.030, 0.036, 0.090).endswith("do not rely on it")


def gpu_row(way, ms, memcpy_ms=10.0, extra=None):
    seconds, parts = ms / 1e3, Parts(0.001, 0.0004, 0.0005)
    row = measure.Row(way, [seconds] * 3, [memcpy_ms / 1e3] * 3, [parts] * 3, Control(235, 984), True, extra)
    return table.row_json(row, Model("m", {"w": ("bfloat16", (500_000,))}), CUDA)


def gpu_verdicts(name, rows, same_gpu=True):
    bars = gpu_bars.bars_json(rows, Model(name, {"w": ("bfloat16", (500_000,))}), same_gpu)
    return [(bar["way"], round(bar["figure"], 2), bar["bar"], bar["met"]) for bar in bars]


def test_between_gpus_a_bar_is_met_or_missed_by_the_figure_that_was_measured():
    view, live, early = "ipc-arena-view-off-http", "ipc-live-copy-off-http", "handle-by-tensor"
    rows = [gpu_row(view, 12.0), gpu_row("ipc-arena-copy-off-http", 99.0), gpu_row(early, 48.0)]
    assert gpu_verdicts("qwen2.5-7b", rows) == [(view, 1.2, 1.2, True), (view, 4.0, 4.0, True), (view, 0.9, 1.0, True)]
    rows = [gpu_row(live, 12.1), gpu_row(early, 48.0), gpu_row("ipc-live-copy-off-ray", 1.0)]
    assert gpu_verdicts("qwen2.5-7b x 0.5", rows) == [(live, 1.21, 1.2, False), (live, 3.97, 4.0, False)]
    rows = [gpu_row(live, 2.5), gpu_row(early, 25.0)]
    assert gpu_verdicts("qwen2.5-0.5b", rows) == [(live, 2.5, 2.0, False), (live, 10.0, 10.0, True)]
    assert gpu_verdicts("qwen3-30b-a3b x 0.25", [gpu_row(live, 15.0)]) == [(live, 1.5, 1.5, True)]
    assert gpu_verdicts("other", [gpu_row(live, 15.0)]) == []


def test_on_a_second_gpu_the_bars_are_the_raw_copy_and_the_faster_broadcast():
    live = "ipc-live-copy-off-http"
    rows = [gpu_row(live, 10.4), gpu_row("nccl-by-tensor", 12.0), gpu_row("nccl-packed", 10.0)]
    assert gpu_verdicts("any", rows, same_gpu=False) == [(live, 96.15, 95.0, True), (live, 0.96, 1.0, False)]
    assert gpu_verdicts("any", rows[:2], same_gpu=False)[1] == (live, 1.15, 1.0, True)


def test_the_table_has_a_column_for_extra_memory_only_where_that_was_measured():
    model = Model("m", {"w": ("bfloat16", (500_000,))})
    rows = [gpu_row("memcpy", 10.0), gpu_row("ipc-arena-view-off-http", 12.0, extra=2_000_000)]
    lines = table.table_text(model, rows, []).splitlines()
    assert lines[2].endswith("  extra MB")
    assert [line.split()[-1] for line in lines[3:5]] == ["-", "2"]
    assert "extra" not in table.table_text(model, [gpu_row("memcpy", 10.0)], [])
