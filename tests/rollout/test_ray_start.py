"""Runs with a real Ray that cannot be had: one line by the deadline, exit code 1, and nothing is left."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from living import living_in

from rlhf.shell.ending import RunError
from transfer.agreement.wire import TransferError
from transfer.config import IpcConfig, RaySenderConfig
from transfer.worker.ray_start import SHORT_PATH, _folder, _holding, private_ray, set_environment, sweep

SOURCE = Path(__file__).resolve().parents[2]


@pytest.fixture
def short():
    """A folder whose path is short enough for Ray; nothing may be left of a Ray in it."""
    folder = Path(f"/tmp/r{os.getpid()}")
    folder.mkdir()
    yield folder
    left = [each.name for each in folder.iterdir() if each.name.startswith(("ray", "session"))]
    subprocess.run(["rm", "-rf", folder], check=True)
    assert left == []


@pytest.fixture
def nothing_left(tmp_path, monkeypatch):
    """Of what is started here, where no other test starts anything."""
    monkeypatch.chdir(tmp_path)
    yield
    deadline = time.monotonic() + 20
    while living_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert living_in(tmp_path) == []


@pytest.mark.slow
def test_a_home_that_cannot_be_written_and_a_long_temporary_folder_are_no_hindrance(short, nothing_left):
    long = short / ("x" * 90)
    long.mkdir()
    own = {"PYTHONPATH": str(SOURCE), "HOME": "/proc/nohome", "RAY_TMPDIR": str(long), "TMPDIR": str(short)}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        own[name] = ""
    variables = {name: value for name, value in (os.environ | own).items() if value}
    done = subprocess.run([sys.executable, "-c", ASKED], env=variables, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["1", "True"] and done.returncode == 0, done.stderr
    assert list(long.iterdir()) == []


ASKED = """
import os, ray
from transfer.worker.ray_start import private_ray
with private_ray(1):
    print(ray.get(ray.remote(lambda: 1).remote()), len(os.listdir(os.environ["TMPDIR"])) == 2)
"""


@pytest.mark.slow
def test_an_address_at_which_nothing_listens_is_one_line_at_once_and_code_1(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "rlhf.train", "experiment=smoke", "steps=1", "transfer/sender=ray"]
        command += [f"transfer.sender.address={address}", f"hydra.run.dir={tmp_path}/run"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=SOURCE)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"transfer.sender.address={address} cannot be used: nothing answers there" in done.stderr
    assert not (tmp_path / "run" / "policy").exists()


@pytest.mark.slow
def test_an_address_that_takes_connections_and_says_nothing_is_one_line_by_the_deadline(short):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began = time.monotonic()
        with pytest.raises(TransferError, match=r"did not answer within transfer\.sender\.start_timeout_s=3"):
            joined(f"127.0.0.1:{mute.getsockname()[1]}", 1, 3.0)
    assert 2 < time.monotonic() - began < 20


def joined(address, workers, timeout_s):
    from rlhf.rollout.ray_workers import ray_running

    with ray_running(RaySenderConfig(address=address, start_timeout_s=timeout_s), workers):
        pass


@pytest.mark.slow
def test_a_ray_with_too_few_cpus_or_with_none_free_is_one_line_by_the_deadline(launch, nothing_left):
    with private_ray(1):
        pass  # after which this process and those that it starts have one token, whatever ran before
    head = subprocess.Popen([sys.executable, "-c", HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with head:
        sender = RaySenderConfig(address=head.stdout.readline().strip(), start_timeout_s=30.0)
        with pytest.raises(TransferError, match=MORE):
            joined(sender.address, 2, 30.0)
        with launch(IpcConfig(sender=sender)) as fleet:
            sender.start_timeout_s = 1.0
            with pytest.raises(RunError, match=r"each takes one CPU of the Ray, of whose 1 0 are free$"):
                fleet.workers.senders()
        head.stdin.close()
        assert head.wait(60) == 0, "it goes on, and ends when it is told"


MORE = (
    r"^the Ray at .*:\d+ has 1 CPU\(s\), and each worker takes one: rollout\.workers must be at most 1 there \(got 2\)$"
)
HEAD = """
import sys
import ray
from transfer.worker.ray_start import private_ray
class Held:
    def up(self):
        return True
with private_ray(1):
    held = ray.remote(num_cpus=1)(Held).remote()
    ray.get(held.up.remote())
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""


def test_ray_gets_the_first_folder_that_is_short_and_can_be_written(tmp_path, monkeypatch):
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * SHORT_PATH)))
    monkeypatch.setenv("TMPDIR", "/proc")
    folder = _folder()
    folder.rmdir()
    assert folder.parent == Path("/tmp") and len(str(folder)) <= SHORT_PATH


def test_folders_of_processes_that_are_gone_are_removed_and_those_in_use_stay(tmp_path):
    kept, left, foreign = (tmp_path / name for name in ("ray-aaaaaaaa", "ray-bbbbbbbb", "ray-cccccccc"))
    for folder in (kept, left, foreign):
        folder.mkdir()
    held = _holding(kept)
    os.close(_holding(left))
    sweep(tmp_path)
    assert kept.is_dir() and not left.exists() and foreign.is_dir()
    os.close(held)
    sweep(tmp_path)
    assert not kept.exists()


def test_without_any_folder_for_its_sockets_one_line_says_what_to_set(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 100)
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    monkeypatch.setattr("transfer.worker.ray_start.tempfile.mkdtemp", refused)
    with pytest.raises(TransferError, match=r"is too long; '/proc/nowhere': No such .*set RAY_TMPDIR") as error:
        _folder()
    assert "\n" not in str(error.value)


def refused(prefix, dir):
    raise FileNotFoundError(2, os.strerror(2))


def test_a_private_ray_has_a_token_of_its_own_unless_the_user_has_chosen(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    set_environment()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    set_environment()
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize("address", ["", "local", "127.0.0.1", "http://127.0.0.1:6379", "a b:1", "127.0.0.1:6379/x"])
def test_an_address_of_another_form_is_refused_with_the_forms_that_there_are(address):
    with pytest.raises(ValueError, match=r"transfer\.sender\.address must be like 127\.0\.0\.1:6379, ray://"):
        RaySenderConfig(address=address)


@pytest.mark.parametrize("address", [None, "auto", "localhost:6379", "[::1]:6379", "ray://head.example:10001"])
def test_an_address_of_these_forms_is_taken(address):
    assert RaySenderConfig(address=address).address == address
