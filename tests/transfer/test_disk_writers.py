"""Folders of `transfer=disk` that two processes write, and files of a size or kind that no trainer writes."""

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from transfer.agreement.manifest import Manifest
from transfer.backends.disk import DiskIntake, DiskPublisher
from transfer.backends.folder_lock import FolderLock
from transfer.config import DiskConfig, SenderConfig

CPU = torch.device("cpu")
WEIGHTS = {"w": torch.zeros(1000)}
WRITER = """
import json, sys
from pathlib import Path
from transfer.backends.folder_lock import FolderLock

try:
    lock = FolderLock(Path(sys.argv[1]), "transfer.path")
    print(json.dumps("ready"), flush=True)
    sys.stdin.read()
except ValueError as error:
    print(json.dumps(str(error)), flush=True)
"""


class Writer:
    """Another trainer's process, which holds a folder."""

    def __init__(self, folder):
        command = [sys.executable, "-c", WRITER, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def said(self):
        return json.loads(self._process.stdout.readline())

    def kill(self):
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()


@contextmanager
def writer_of(folder):
    """A process that holds this folder, or says why not."""
    writer = Writer(folder)
    try:
        yield writer
    finally:
        writer.kill()


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks."""

    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)


def reader(folder):
    """A worker's half."""
    intake = DiskIntake({"backend": "disk", "folder": str(folder)})
    intake.prepare(Manifest.of(WEIGHTS), {}, CPU)
    return intake


def written(tmp_path):
    """A reader, where version 0 waits, and the two files."""
    publisher = DiskPublisher(DiskConfig(sender=SenderConfig(), path=str(tmp_path)), tmp_path)
    publisher.prepare(Manifest.of(WEIGHTS), WEIGHTS)
    where, _ = publisher.write(0, WEIGHTS, (), False)
    publisher.close()
    return reader(tmp_path), where, tmp_path / "00000000-00000000.json", tmp_path / "00000000-00000000.safetensors"


def test_a_trainer_that_was_replaced_overwrites_nothing_of_the_next_one(tmp_path, no_locks):
    trainers = []
    for epoch in (1, 2):
        weights = {"w": torch.full((1000,), float(epoch))}
        trainers.append((DiskPublisher(DiskConfig(sender=SenderConfig(), path=str(tmp_path)), tmp_path), weights))
        trainers[-1][0].prepare(Manifest.of(weights), weights)
        trainers[-1][0].fence(epoch)
    with ThreadPoolExecutor(2) as pool:
        for version in range(8):
            under_way = [pool.submit(publisher.write, version, weights, (), False) for publisher, weights in trainers]
            for epoch, each in enumerate(under_way, 1):
                assert (reader(tmp_path).stage(version, each.result()[0])["w"] == epoch).all()
    for publisher, _ in trainers:
        publisher.close()


def test_a_folder_has_one_writer_at_a_time_and_says_which_until_that_is_killed(tmp_path):
    config = DiskConfig(sender=SenderConfig(), path=str(tmp_path))
    with writer_of(tmp_path) as first:
        assert first.said() == "ready"
        with pytest.raises(ValueError) as caught:
            DiskPublisher(config, tmp_path)
        said = str(caught.value)
        assert f"{tmp_path} is written by process {first.pid} on {socket.gethostname()} since 20" in said
        assert said.endswith("end that first, or set transfer.path to another folder")
        first.kill()
        DiskPublisher(config, tmp_path).close()


def test_two_writers_in_one_process_are_told_so_and_the_folder_is_free_after_close(tmp_path):
    first = FolderLock(tmp_path, "transfer.path")
    with pytest.raises(ValueError, match=r"is written by this process: end that first, or set transfer\.path"):
        FolderLock(tmp_path, "transfer.path")
    with writer_of(tmp_path) as other:
        assert f"is written by process {os.getpid()}" in other.said(), "the refusal has not ended the lock"
    first.close()
    FolderLock(tmp_path, "transfer.path").close()


def test_a_child_that_outlives_a_killed_trainer_does_not_keep_the_folder(tmp_path):
    ready, go = os.pipe(), os.pipe()
    trainer = os.fork()
    if not trainer:
        lock = FolderLock(tmp_path, "transfer.path")
        if not os.fork():
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os._exit(0)
        os.read(go[0], 1)
        del lock
        os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"x"
        os.kill(trainer, signal.SIGKILL)
        os.waitpid(trainer, 0)
        FolderLock(tmp_path, "transfer.path").close()
    finally:
        os.write(go[1], b"xx")
        for end in (*ready, *go):
            os.close(end)


def test_a_file_system_without_locks_is_written_with_a_warning(tmp_path, no_locks, caplog):
    FolderLock(tmp_path, "transfer.path").close()
    assert "cannot be locked (No locks available)" in caplog.text


def put_file(folder):
    folder.rmdir()
    folder.write_text("")


UNUSABLE = {
    "a file in its place": put_file,
    "a folder in the lock's place": lambda folder: (folder / ".writer").mkdir(),
    "a link in the lock's place": lambda folder: (folder / ".writer").symlink_to(folder / "elsewhere"),
}


@pytest.mark.parametrize("put", UNUSABLE.values(), ids=UNUSABLE)
def test_a_folder_that_cannot_be_written_to_is_one_line_with_the_key(put, tmp_path):
    (tmp_path / "weights").mkdir()
    put(tmp_path / "weights")
    with pytest.raises(ValueError, match=r"^transfer\.path must be a folder that can be written to \(got '.*'; "):
        DiskPublisher(DiskConfig(sender=SenderConfig()), tmp_path)


def test_what_a_holder_says_of_itself_is_one_safe_line(tmp_path):
    with writer_of(tmp_path) as other:
        assert other.said() == "ready"
        (tmp_path / ".writer").write_bytes(b"nobody\x1b[2J\n\x9b31m\xff")
        with pytest.raises(ValueError) as caught:
            FolderLock(tmp_path, "transfer.path")
    assert "is written by nobody" in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("which", [0, 1], ids=["json", "safetensors"])
def test_a_file_of_another_size_than_announced_is_refused_before_it_is_read(which, tmp_path):
    intake, where, *paths = written(tmp_path)
    os.truncate(paths[which], 2**40)  # more than there is memory; takes no room
    with pytest.raises(ValueError, match=rf"{paths[which].name} has 1,099,511,627,776 bytes, more than were announced"):
        intake.stage(0, where)


def test_more_bytes_than_the_weights_can_have_are_not_read_though_they_are_announced(tmp_path):
    intake, where, _, path = written(tmp_path)
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match="is announced with 1,099,511,627,776 bytes, more than its weights can have"):
        intake.stage(0, {**where, "bytes": 2**40})


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_is_shorter_or_longer_than_announced_is_refused(change, tmp_path):
    intake, where, _, path = written(tmp_path)
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(ValueError, match=r"is damaged|more than were announced"):
        intake.stage(0, where)


def put_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")  # short enough for an address
        finally:
            os.close(folder)


def put_device(path):
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # as /dev/zero


KINDS = {"fifo": os.mkfifo, "folder": os.mkdir, "socket": put_socket, "device": put_device}


@pytest.mark.parametrize("which", [0, 1], ids=["json", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_not_even_opened(kind, which, tmp_path, monkeypatch):
    intake, where, *paths = written(tmp_path)
    paths[which].unlink()
    try:
        KINDS[kind](paths[which])
    except PermissionError:
        pytest.skip("only root may make a device")
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: (opened.append(path), real(path, *rest, **more))[1])
    with pytest.raises(ValueError, match="must be a regular file"):
        intake.stage(0, where)
    assert paths[which].name not in opened
