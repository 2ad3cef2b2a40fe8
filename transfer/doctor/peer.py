"""The second process of a check that needs one: `python -m transfer.doctor.peer VERB ARGUMENT...`, answers in JSON."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import mmap
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transfer.doctor.finding import Problem
from transfer.doctor.load import patient

ROUND_TRIPS = 100
CONNECTIONS = 20
TIMEOUT_S = 5.0  # of one socket operation


@contextmanager
def beside(*words: str) -> Iterator[Callable[[float], dict[str, Any]]]:
    """Start the other process; the function that waits, so many seconds, for its answer. Problem if it gives none."""
    command = [sys.executable, "-m", "transfer.doctor.peer", *words]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def answer(seconds: float) -> dict[str, Any]:
        try:
            said, complaint = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Problem(f"another process did not {words[0]} within {seconds:g} s") from None
        if process.returncode:
            last = (complaint.strip().splitlines() or ["it said nothing"])[-1]
            raise Problem(f"another process could not {words[0]}: {last}")
        return json.loads(said) | {"pid": process.pid}

    with process:
        try:
            yield answer
        finally:
            process.kill()


# --- what the other process does --------------------------------------------------------------------------------------


def fetch_memory(name: str) -> dict[str, Any]:
    """Take a descriptor from an abstract Unix socket: the memory's hash, its seals, whether it resists, and whose."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(patient(TIMEOUT_S))
        connection.connect(f"\0{name}")
        pid, uid, _ = peer_of(connection)
        _, fds, _, _ = socket.recv_fds(connection, 1, 1)
    if not fds:
        raise RuntimeError("no descriptor came with the message")
    return {**_read(fds[0]), "of_pid": pid, "of_uid": uid}


def open_descriptor(pid: str, fd: str) -> dict[str, Any]:
    """Open another process's descriptor under /proc: the memory's hash and seals."""
    return _read(os.open(f"/proc/{int(pid)}/fd/{int(fd)}", os.O_RDONLY | os.O_CLOEXEC))


def call_over_http(host: str, port: str) -> dict[str, Any]:
    """Milliseconds of a small POST: the median on one kept-alive connection, and with a new one each time."""
    connection = http.client.HTTPConnection(host, int(port), timeout=patient(TIMEOUT_S))
    connection.connect()
    nodelay = connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    kept = [_post_ms(connection) for _ in range(ROUND_TRIPS)]
    connection.close()
    new = []
    for _ in range(CONNECTIONS):
        connection = http.client.HTTPConnection(host, int(port), timeout=patient(TIMEOUT_S))
        new.append(_post_ms(connection))
        connection.close()
    return {"kept_ms": statistics.median(kept), "new_ms": statistics.median(new), "nodelay": bool(nodelay)}


def open_gpu_memory(uuid: str, handle: str, nbytes: str) -> dict[str, Any]:
    """Map another process's cudaMalloc region by its handle: the hash of its bytes."""
    from transfer.memory.regions import PeerCudaRegion

    region = PeerCudaRegion(uuid, handle, int(nbytes))
    return {"hash": hashlib.sha256(region.bytes.cpu().numpy().tobytes()).hexdigest()}


VERBS: dict[str, Callable[..., dict[str, Any]]] = {
    "fetch": fetch_memory,
    "open": open_descriptor,
    "call": call_over_http,
    "map": open_gpu_memory,
}


def peer_of(connection: socket.socket) -> tuple[int, int, int]:
    """The process, user and group at the other end of a Unix socket, as the kernel says (SO_PEERCRED)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return pid, uid, gid


def _read(fd: int) -> dict[str, Any]:
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
        hashed = hashlib.sha256(memory).hexdigest()
    return {"hash": hashed, "seals": fcntl.fcntl(fd, fcntl.F_GET_SEALS), "refuses_writes": _refuses_writes(fd)}


def _refuses_writes(fd: int) -> bool:
    try:
        os.pwrite(fd, b"x", 0)
    except OSError:
        return True
    return False


def _post_ms(connection: http.client.HTTPConnection) -> float:
    began = time.perf_counter()
    connection.request("POST", "/", b"{}", {"Content-Type": "application/json"})
    with connection.getresponse() as answer:
        answer.read()
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    print(json.dumps(VERBS[sys.argv[1]](*sys.argv[2:])))
