"""What the machine offers: memory that processes share, sockets, loopback HTTP, limits.

Each function is a check: it takes what it looks at, and returns a finding or raises what went wrong.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import resource
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from transfer.doctor.finding import Finding, Problem, ok, skip, warn
from transfer.doctor.load import patient
from transfer.doctor.peer import beside, peer_of

MIB = 2**20
SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL  # of the session's slots
FUTURE_WRITE = 0x0010  # F_SEAL_FUTURE_WRITE, linux/fcntl.h, of Linux 5.1
PEER_S = 8.0  # for another process to do its part
DOCKER_SHM = 64 * MIB  # of /dev/shm, unless a container was started with another size
SLOW_MS = 5.0  # a round trip on loopback that costs an update more than the weights do
FILES = 1024  # open files that a run with some workers and Ray can need

FIRST_PIDS = "pid:[4026531836]"  # the pid namespace that a machine boots with (PROC_PID_INIT_INO, linux/proc_ns.h)
HANDLES_NEED = (
    "torch's own handles (the one-shot API on GPUs) need one /dev/shm and one pid namespace for all processes"
)


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(meminfo: str = "/proc/meminfo", limits: str = "/sys/fs/cgroup") -> Finding:
    """How much memory is free: the weights need it once for each slot."""
    lines = [line.split() for line in Path(meminfo).read_text(encoding="utf-8").splitlines()]
    table = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}
    seen = f"{table['MemAvailable'] / 2**30:.1f} of {table['MemTotal'] / 2**30:.1f} GiB are free"
    limit = _memory_limit(Path(limits))
    if limit is not None and limit >= table["MemTotal"]:
        limit = None
    if limit is not None:
        seen += f"; this container may use {limit / 2**30:.1f} GiB"
    return ok(seen, free_bytes=table["MemAvailable"], limit_bytes=limit)


def _memory_limit(folder: Path) -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        with suppress(OSError, ValueError):
            return int((folder / name).read_text(encoding="utf-8"))
    return None


def memfd(create: Callable[[str, int], int] = os.memfd_create, seals: int = SEALS) -> Finding:
    """Whether there is memory without a name, and whether its seals hold."""
    with _sealed(create, seals, b"\0" * MIB) as fd:
        for size in (0, 2 * MIB):
            try:
                os.ftruncate(fd, size)
            except PermissionError:
                continue
            raise Problem("a sealed memfd could be resized, so that a peer could crash whoever reads it")
    if not _resists_writers(create):
        return warn(
            "memory without a name, sealed against resizing, but this kernel cannot seal it against other writers",
            "use Linux 5.1 or newer where other processes of this user may mean harm: they could change the weights",
        )
    return ok("memory without a name, sealed against resizing and every writer but the trainer")


def _resists_writers(create: Callable[[str, int], int]) -> bool:
    """Whether memory that is mapped for writing here can be closed to whoever opens it anew."""
    with _sealed(create, 0, b"\0" * MIB) as fd, mmap.mmap(fd, MIB):
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | FUTURE_WRITE)
        with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as again:
            try:
                again.write(b"x")
            except PermissionError:
                return True
    return False


@contextmanager
def _sealed(create: Callable[[str, int], int], seals: int, data: bytes) -> Iterator[int]:
    try:
        fd = create("doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise Problem(f"memfd_create is refused: {error}") from error
    try:
        os.ftruncate(fd, len(data))
        os.pwrite(fd, data, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


def descriptors(user: int | None = None) -> Finding:
    """Whether a second process gets memory over an abstract Unix socket, and both see who the other is."""
    data, name, user = os.urandom(MIB), f"doctor-{secrets.token_hex(16)}", os.geteuid() if user is None else user
    with (
        _sealed(os.memfd_create, SEALS, data) as fd,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
    ):
        listener.settimeout(patient(PEER_S) / 2)
        listener.bind(f"\0{name}")
        listener.listen(1)
        with beside("fetch", name) as answer:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                answer(1.0)  # its reason
                raise
            with connection:
                pid, uid, _ = peer_of(connection)
                with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as read_only:
                    socket.send_fds(connection, [b"\0"], [read_only.fileno()])
            said = answer(patient(PEER_S))
    if said["hash"] != hashlib.sha256(data).hexdigest() or not said["refuses_writes"]:
        raise Problem("the other process got other memory than was sent, or could write to it")
    if (pid, uid, said["of_pid"], said["of_uid"]) != (said["pid"], user, os.getpid(), user):
        raise Problem(
            f"SO_PEERCRED does not say who is there: process {pid} of user {uid}, and to it {said['of_pid']} of "
            f"{said['of_uid']}; they are {said['pid']} of {user} and {os.getpid()}"
        )
    return ok(f"a second process got 1 MiB read-only; each saw the other's process id and user {uid}")


def proc_descriptors(scope: str = "/proc/sys/kernel/yama/ptrace_scope", proc: str = "/proc") -> Finding:
    """Whether a second process may open this one's memory under /proc/<pid>/fd, as the one-shot API on CPU does."""
    data = os.urandom(MIB)
    yama = Path(scope)
    restricted = f" (ptrace_scope {yama.read_text(encoding='utf-8').strip()})" if yama.exists() else ""
    if not os.path.isdir(f"{proc}/self/fd"):
        raise Problem(f"{proc} is not mounted")
    with (
        _sealed(os.memfd_create, SEALS | fcntl.F_SEAL_WRITE, data) as fd,
        beside("open", str(os.getpid()), str(fd)) as answer,
    ):
        said = answer(patient(PEER_S))
    if said["hash"] != hashlib.sha256(data).hexdigest() or not said["refuses_writes"]:
        raise Problem("the other process saw other memory, or could write to it although it was sealed")
    return ok(f"a second process of this user opened 1 MiB by /proc/<pid>/fd{restricted}")


def shared_folder(
    folder: str = "/dev/shm", space: Callable[[str], os.statvfs_result] = os.statvfs, mounts: str = "/proc/mounts"
) -> Finding:
    """Whether /dev/shm is there, is memory, and has room: Ray and torch's own sharing use it, transfer=ipc does not."""
    if not os.path.isdir(folder):
        raise Problem(f"{folder} is not there")
    kinds = [
        line.split()[2] for line in Path(mounts).read_text(encoding="utf-8").splitlines() if line.split()[1] == folder
    ]
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * MIB)
        file.flush()
        with mmap.mmap(file.fileno(), MIB) as view:
            view[:8] = b"doctored"
    stat = space(folder)
    total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    seen = f"{kinds[-1] if kinds else 'no mount of its own'}; {_size(free)} of {_size(total)} are free"
    figures = {"total_bytes": total, "free_bytes": free}
    if not {"tmpfs", "ramfs"} & set(kinds[-1:]):
        return warn(f"{seen}: it may be a disk", f"mount a tmpfs at {folder}", **figures)
    if total <= DOCKER_SHM or free < DOCKER_SHM // 4:
        how = "is docker's default" if total == DOCKER_SHM else "is little"
        return warn(f"{seen}, which {how}", "docker run --shm-size=8g, or --ipc=host; transfer=ipc can do without it")
    return ok(seen, **figures)


# --- loopback ---------------------------------------------------------------------------------------------------------


def loopback(host: str = "127.0.0.1", delay_s: float = 0.0) -> Finding:
    """How long a small POST to another process takes: kept alive, and with a new connection."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections alive
        disable_nagle_algorithm = True
        wbufsize = -1  # header and body in one segment

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            threading.Event().wait(delay_s)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((host, 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            with beside("call", host, str(server.server_port)) as answer:
                said = answer(patient(PEER_S))
        finally:
            server.shutdown()
            thread.join()
    figures = {"kept_ms": round(said["kept_ms"], 3), "new_ms": round(said["new_ms"], 3)}
    seen = (
        f"{figures['kept_ms']:.2f} ms a round trip kept alive, {figures['new_ms']:.2f} ms with a new connection; "
        f"TCP_NODELAY {'on' if said['nodelay'] else 'off'}"
    )
    if figures["kept_ms"] > SLOW_MS:
        return warn(f"{seen}: slow", "look for a proxy, a VPN or a sandbox on loopback, or a busy machine", **figures)
    return ok(seen, **figures)


# --- limits and containers --------------------------------------------------------------------------------------------


def open_files(limits: tuple[int, int] | None = None) -> Finding:
    """How many descriptors a process may have."""
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    seen = f"{soft} a process, {'no limit' if hard == resource.RLIM_INFINITY else hard} at most"
    if soft != resource.RLIM_INFINITY and soft < FILES:
        return warn(f"{seen}: Ray and many workers can need more", f"ulimit -n {4 * FILES}")
    return ok(seen, soft=soft, hard=hard)


def container(root: str = "/") -> Finding:
    """Whether this is a container, and whether it has process numbers of its own."""
    base = Path(root)
    marks = [name for name in (".dockerenv", "run/.containerenv") if (base / name).exists()]
    with suppress(OSError):
        groups = (base / "proc/1/cgroup").read_text(encoding="utf-8")
        marks += [word for word in ("docker", "kubepods", "containerd", "lxc") if word in groups]
    own = os.readlink(base / "proc/self/ns/pid") != FIRST_PIDS
    if not marks and not own:
        return skip("none: process numbers are the host's", own_pids=own)
    where = f"a container ({', '.join(marks)})" if marks else "perhaps a container"
    pids = "a pid namespace of its own" if own else "the host's process numbers"
    return ok(f"{where} with {pids}: trainer and workers belong in the same one; {HANDLES_NEED}", own_pids=own)


def _size(nbytes: int) -> str:
    return f"{nbytes / MIB:.0f} MiB" if nbytes < 1024 * MIB else f"{nbytes / 2**30:.1f} GiB"
