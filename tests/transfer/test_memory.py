import gc
import os
import socket
from pathlib import Path

import pytest
import torch
from worker_process import CONTEXT, Float8Model, OddModel

from transfer.agreement.manifest import Manifest
from transfer.memory import descriptors, regions


@pytest.fixture
def server():
    server = descriptors.DescriptorServer()
    yield server
    server.close()


def mappings():
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:transfer" in line]


def read_peer(path, nbytes, connection):
    torch.set_num_threads(1)
    region = descriptors.receive_region(path, nbytes)
    connection.send(bytes(region.bytes.numpy()))
    connection.recv()
    connection.send(bytes(region.bytes.numpy()))
    region.close()


def write_peer(path, nbytes):
    descriptors.receive_region(path, nbytes).bytes[0] = 1


def test_another_process_sees_the_bytes_and_later_writes(server):
    region = regions.HostRegion(2 * regions.PAGE)
    server.offer(region)
    region.bytes.copy_(torch.arange(region.bytes.numel()) % 251)
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=read_peer, args=(server.path, 2 * regions.PAGE, theirs))
    process.start()
    assert ours.poll(30) and ours.recv() == bytes(region.bytes.numpy())
    region.bytes.fill_(7)
    ours.send("again")
    assert ours.poll(30) and set(ours.recv()) == {7}
    process.join(30)
    assert process.exitcode == 0
    region.close()


def test_a_peer_that_writes_dies_and_changes_nothing(server):
    region = regions.HostRegion(regions.PAGE)
    server.offer(region)
    process = CONTEXT.Process(target=write_peer, args=(server.path, regions.PAGE))
    process.start()
    process.join(30)
    assert process.exitcode == -11  # SIGSEGV
    assert not region.bytes.any()
    region.close()


def test_the_descriptor_that_is_handed_out_cannot_be_written_through():
    region = regions.HostRegion(regions.PAGE)
    fd = region.read_only_fd()
    with pytest.raises(OSError):
        os.write(fd, b"x")
    os.close(fd)
    region.close()


def test_memory_cannot_be_resized_by_anyone(server):
    region = regions.HostRegion(regions.PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(region._fd, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(region._fd, 2 * regions.PAGE)
    region.close()


@pytest.mark.parametrize("model", [OddModel, Float8Model])
def test_every_kind_of_tensor_has_its_bytes_back(model, server):
    weights = model(seed=1).state_dict()
    manifest = Manifest.of(weights)
    region = regions.HostRegion(2 * regions.slot_bytes(manifest))
    server.offer(region)
    peer = descriptors.receive_region(server.path, 2 * regions.slot_bytes(manifest))
    for name, view in regions.tensors(region, manifest, 1).items():
        view.copy_(weights[name])
    for name, view in regions.tensors(peer, manifest, 1).items():
        raw, expected = (t.contiguous().view(-1).view(torch.uint8) for t in (view, weights[name]))
        assert view.shape == weights[name].shape and torch.equal(raw, expected), name
    assert not regions.tensors(peer, manifest, 0)[manifest.entries[0].name].view(torch.uint8).any()
    region.close()
    peer.close()


def test_memory_of_another_size_or_without_seals_is_refused(server):
    region = regions.HostRegion(regions.PAGE)
    server.offer(region)
    with pytest.raises(ValueError, match="must be sealed and have 8192 bytes"):
        descriptors.receive_region(server.path, 2 * regions.PAGE)
    region.close()
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, regions.PAGE)
    with pytest.raises(ValueError, match="must be sealed"):
        regions.PeerHostRegion(fd, regions.PAGE)
    os.close(fd)


def test_a_server_with_nothing_to_offer_hands_over_nothing(server):
    with pytest.raises(ConnectionError, match="handed over no memory"):
        descriptors.receive_region(server.path, regions.PAGE)


def test_the_socket_has_a_name_that_cannot_be_guessed_and_is_in_no_folder(server):
    another = descriptors.DescriptorServer()
    another.close()
    assert server.path[0] == "\0" and len(server.path) > 32 and server.path != another.path


def test_another_users_process_gets_no_memory(server, monkeypatch):
    region = regions.HostRegion(regions.PAGE)
    server.offer(region)
    monkeypatch.setattr(regions.os, "geteuid", lambda: 12345)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server.path)
        connection.settimeout(10)
        assert socket.recv_fds(connection, 1, 1)[1] == []
    with pytest.raises(ConnectionError, match="belongs to another user"):
        descriptors.receive_region(server.path, regions.PAGE)
    region.close()


def test_a_peer_that_hangs_up_does_not_end_the_server(server):
    region = regions.HostRegion(regions.PAGE)
    server.offer(region)
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(server.path)
    descriptors.receive_region(server.path, regions.PAGE).close()
    region.close()


def test_nothing_is_left_after_close():
    gc.collect()
    before = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd")), mappings()
    server = descriptors.DescriptorServer()
    region = regions.HostRegion(regions.PAGE)
    server.offer(region)
    peer = descriptors.receive_region(server.path, regions.PAGE)
    assert len(mappings()) == len(before[2]) + 2
    peer.close()
    region.close()
    server.close()
    gc.collect()
    assert (set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd")), mappings()) == before


def test_a_tensor_keeps_the_memory_of_a_closed_region():
    region = regions.HostRegion(regions.PAGE)
    view = region.bytes[:4].fill_(9)
    region.close()
    gc.collect()
    assert view.tolist() == [9, 9, 9, 9]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_process_reads_gpu_memory_by_its_handle():
    region = regions.CudaRegion(2 * regions.PAGE, torch.device("cuda", 0))
    region.bytes.copy_(torch.arange(region.bytes.numel()) % 251)
    torch.cuda.synchronize()
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(
        target=read_gpu, args=(regions.device_uuid(region.device), region.handle, 2 * regions.PAGE, theirs)
    )
    process.start()
    assert ours.poll(60) and ours.recv() == bytes(region.bytes.cpu().numpy())
    process.join(60)
    assert process.exitcode == 0
    region.close()


def read_gpu(uuid, handle, nbytes, connection):
    region = regions.PeerCudaRegion(uuid, handle, nbytes)
    connection.send(bytes(region.bytes.cpu().numpy()))
    region.close()


def test_a_gpu_handle_of_another_form_is_refused_before_any_cuda_call():
    with pytest.raises(ValueError, match="128 hexadecimal digits"):
        regions.PeerCudaRegion("uuid", "zz" * 64, regions.PAGE)
