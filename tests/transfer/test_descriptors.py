"""The socket that hands out the trainer's memory, with few descriptors, among strangers, and against writers."""

import fcntl
import gc
import mmap
import os
import resource
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
from worker_process import CONTEXT

from transfer.memory import descriptors, regions

NOBODY = 65534
FLOOD = f"""
import os, socket, sys
if os.geteuid() == 0:
    os.setuid({NOBODY})
held = []
print("up", flush=True)
while True:
    one = socket.socket(socket.AF_UNIX)
    one.setblocking(False)
    try:
        one.connect("\\0" + sys.argv[1])
    except BlockingIOError:
        pass
    held = [*held[-100:], one]
"""


@pytest.fixture
def offered():
    """A server that hands out a page of ones."""
    server, region = descriptors.DescriptorServer(), regions.HostRegion(regions.PAGE)
    region.bytes.fill_(1)
    server.offer(region)
    yield server, region
    server.close()
    region.close()


def fetch(path, connection):
    try:
        connection.send(int(descriptors.receive_region(path, regions.PAGE).bytes.sum()))
    except Exception as error:
        connection.send(repr(error))


def fetched_elsewhere(path):
    """What another process sees of the memory, which says so with one number, or its error."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=fetch, args=(path, theirs))
    process.start()
    assert ours.poll(60)
    said = ours.recv()
    process.join(30)
    return said


def without_descriptors(free, given):
    """A process whose server has so many descriptors for its peers, and some more when it is told."""
    gc.collect()
    gc.disable()  # nothing else gives descriptors back
    region = regions.HostRegion(regions.PAGE)
    region.bytes.fill_(1)
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 3
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    taken = []
    while True:
        try:
            taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            break

    def give(count):
        for fd in taken[:count]:
            os.close(fd)
        del taken[:count]

    give(1 + free)  # its own; one that it has when it begins to accept is kept for whoever comes
    server = descriptors.DescriptorServer()
    server.offer(region)
    given.send(server.path)
    for count in iter(given.recv, "end"):
        give(count)
    server.close()


@pytest.mark.parametrize("free", [0, 1], ids=["none to accept with", "one, and none to hand over"])
def test_a_server_without_descriptors_hands_over_the_memory_once_it_has_some(free):
    ours, theirs = CONTEXT.Pipe()
    server = CONTEXT.Process(target=without_descriptors, args=(free, theirs))
    server.start()
    path = ours.recv()
    got, sent = CONTEXT.Pipe()
    client = CONTEXT.Process(target=fetch, args=(path, sent))
    client.start()
    assert not got.poll(0.2), f"it waits (got {got.recv()})"
    ours.send(3)
    assert got.poll(30) and got.recv() == regions.PAGE
    assert fetched_elsewhere(path) == regions.PAGE
    ours.send("end")
    for process in (server, client):
        process.join(30)
        assert process.exitcode == 0


@pytest.mark.slow
def test_workers_get_the_memory_while_strangers_flood_the_socket(offered):
    server, _ = offered
    with ExitStack() as stack:
        for _ in range(3):
            command = [sys.executable, "-S", "-c", FLOOD, server.path[1:]]
            flood = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(flood.kill)
            assert flood.stdout.readline() == b"up\n"
        for _ in range(20):
            region = descriptors.receive_region(server.path, regions.PAGE)
            assert int(region.bytes.sum()) == regions.PAGE
            region.close()
        assert fetched_elsewhere(server.path) == regions.PAGE


def test_a_queue_that_stays_full_ends_in_one_line_by_the_deadline(monkeypatch):
    monkeypatch.setattr(descriptors, "HANDSHAKE_S", 0.3)
    path, began = f"\0transfer-test-full-{os.getpid()}", time.monotonic()
    with socket.socket(socket.AF_UNIX) as deaf, ExitStack() as stack:
        deaf.bind(path)
        deaf.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
        with pytest.raises(TimeoutError, match=r"handed over no memory within 0\.3 s: it is kept busy"):
            descriptors.receive_region(path, regions.PAGE)
    assert 0.2 < time.monotonic() - began < 10


def test_a_server_that_never_answers_ends_in_one_line_by_the_deadline(monkeypatch):
    monkeypatch.setattr(descriptors, "HANDSHAKE_S", 0.3)
    path = f"\0transfer-test-mute-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(path)
        mute.listen(5)
        with pytest.raises(TimeoutError, match="kept busy"):
            descriptors.receive_region(path, regions.PAGE)


def write_anew(path, connection):
    """Try to write to the trainer's memory by the descriptor that it hands out, opened once more."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(path)
        _, (fd,), _, _ = socket.recv_fds(asking, 1, 1)
    tried = {}
    for name, write in {
        "opened for writing": lambda again: os.pwrite(again, b"x", 0),
        "mapped for writing": lambda again: mmap.mmap(again, regions.PAGE).write(b"x"),
    }.items():
        try:
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            write(again)
            tried[name] = "written"
        except PermissionError:
            tried[name] = "refused"
    connection.send(tried)


def test_the_memory_cannot_be_written_by_opening_its_descriptor_anew(offered):
    server, region = offered
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=write_anew, args=(server.path, theirs))
    process.start()
    assert ours.poll(30) and ours.recv() == {"opened for writing": "refused", "mapped for writing": "refused"}
    process.join(30)
    assert int(region.bytes.sum()) == regions.PAGE
    region.bytes.fill_(2)  # the trainer itself can
    assert fetched_elsewhere(server.path) == 2 * regions.PAGE


def test_a_kernel_without_the_seal_shares_the_memory_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(regions, "FUTURE_WRITE", 0x4000)  # which this kernel does not know
    from transfer.agreement.manifest import Manifest
    from transfer.backends.arena import Slots

    region = regions.HostRegion(regions.PAGE)
    assert not region.sealed and fcntl.fcntl(region._fd, fcntl.F_GET_SEALS) == regions.SEALS
    region.close()
    slots = Slots()
    weights = {"w": region.bytes.new_zeros(4)}
    slots.allocate(Manifest.of(weights), weights, 1)
    slots.close()
    assert "F_SEAL_FUTURE_WRITE" in caplog.text


def test_a_closed_region_hands_out_nothing_that_took_its_place():
    region = regions.HostRegion(regions.PAGE)
    region.close()
    with pytest.raises(OSError):
        region.read_only_fd()
